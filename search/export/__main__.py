"""`python -m search.export`"""

import sys

from search.export import main

sys.exit(main())
