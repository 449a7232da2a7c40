"""`python -m allocators.show`"""

import sys

from search.show.look import main

sys.exit(main())
