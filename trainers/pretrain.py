"""The door of `python -m trainers.pretrain`: makes the embedded models again (trainers/embedded/pretrain.py)."""

from allocators.core import words
from trainers.embedded.pretrain import main

if __name__ == "__main__":
    words.run(main)
