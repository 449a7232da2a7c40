"""The door of `python -m trainers.pretrain`: makes the embedded models again (trainers/embedded/pretrain.py)."""

import sys

from allocators.core import words
from trainers import command
from trainers.embedded.pretrain import main

if __name__ == "__main__":
    sys.exit(command.run(lambda: words.run(main)))
