"""The command of this folder: `python -m search.evaluate STUDY [key=value ...]`."""

import sys

from search.evaluate import main
from trainers import command

if __name__ == "__main__":
    sys.exit(command.run(main))
