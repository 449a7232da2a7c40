Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "<frozen runpy>", line 88, in _run_code
  File "/work/main/tests/benchmarks/nodes.py", line 255, in <module>
    sys.exit(main())
             ^^^^^^
  File "/work/main/tests/benchmarks/nodes.py", line 243, in main
    settings = words.parse(sys.argv[1:] if argv is None else argv, Settings)
               ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/work/main/allocators/core/words.py", line 133, in parse
    return build(settings, split(words, example=example or _example(settings))[1])
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/work/main/allocators/core/words.py", line 145, in build
    check(built)
  File "/work/main/allocators/core/words.py", line 298, in check
    raise StudyError(f"{f.name} must be at most {most}, got {shown(str(value))}")
allocators.core.errors.StudyError: workers must be at most 2, got 3
