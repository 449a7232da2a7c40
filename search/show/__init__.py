"""What `python -m allocators.show` displays: signals, and the answers of allocators, as text, PNG and HTML."""
