"""`python -m search.replay`"""

import sys

from search.replay import main

sys.exit(main())
