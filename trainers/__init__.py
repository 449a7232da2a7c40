"""From an allocation to a trained, evaluated adapter. Nothing here knows of a search; only worker.py knows of Ray.

models/       base models by name: embedded, packaged, a folder, a Hugging Face id
tasks/        lm-evaluation-harness tasks: training rows, calibration prompts, accuracy
adapter/      the door to every adapter: attach, detach, merge, save, load
loop/         one training run: steps, rungs, checkpoint, resume
packing/      several training runs in one pass over the base
recipes.py    settings of a training by name
storage.py    files and folders at a path or a URI
versions.py   what a result can depend on
timing.py     how long steps and questions take here
command.py    how a command is run: its streams outlast the terminal
worker.py     what runs on every Ray Train worker of a study
              worker_state.py: what a worker holds and does, without Ray; worker_slots.py: several trials in one pass
pretrain.py   the door of the command that makes the embedded models
embedded/     models and tasks that come with the package; pretrain.py and domains.py make them again
"""
