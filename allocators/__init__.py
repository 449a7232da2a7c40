"""Where LoRA goes: one file an allocator, a pure function from a signal and a model's shape to an allocation.

    python -m allocators.show model=tiny-moe         what would each of them do to my model, and at what cost?

    from allocators import sieve
    from allocators.core.shapes import shape_from_config
    sieve.allocate(signal, shape_from_config(config, name="mine"), fraction=0.25).trainable_params(shape, rank=32)

core/       the nouns (types.py), model shapes from configs, rounding, plug-ins, errors: standard library only
signals/    what allocators read, measured on a model and cached: routing, spectrum, sensitivity
show.py     the command above

A new allocator is a new file here; nothing is registered. What it must define: `core/plugins.py`.
"""
