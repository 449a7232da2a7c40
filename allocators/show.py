"""The door of `python -m allocators.show`; `help` lists what it can do. The command itself is search/show/.

It loads models and tasks, which the pure rules of this folder must not: the door names it and imports nothing.
"""

import runpy

if __name__ == "__main__":
    runpy.run_module("search.show", run_name="__main__")
