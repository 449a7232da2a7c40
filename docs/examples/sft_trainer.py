"""A rule of this toolkit inside TRL's SFTTrainer: where LoRA goes is decided here, TRL does the rest.

    pip install trl
    python docs/examples/sft_trainer.py                # the embedded dense model: offline, a minute on a CPU
    python docs/examples/sft_trainer.py 200            # so many steps

What is ours: `les.allocate` says how many LoRA experts every layer gets, `les.attach` puts them there.
What is TRL's: prompts and completions as text, tokens, collator, loss on the completion alone, Trainer.
"""

import sys

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import lora_expert_search as les
from trainers import tasks


def main(steps: int = 60) -> list[float]:
    """Trains MoLA's layout, few experts below and many above; gives the losses that the Trainer logged."""
    allocation = les.allocate("mola", model="tiny-dense", pattern="2468")
    base = les.load_model("tiny-dense")
    adapter = les.attach(base.model, allocation, rank=4, lora_alpha=64)
    print(f"{allocation.total_experts} experts, {adapter.num_trainable:,} parameters")

    questions = tasks.load_task("tiny_turncipher").datasets[0].training.documents
    rows = [{"prompt": q["question"], "completion": f" {q['choices'][q['label']]}"} for q in questions]
    trainer = SFTTrainer(
        model=base.model,
        processing_class=base.tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            output_dir="sft_trainer",
            max_steps=steps,
            per_device_train_batch_size=16,
            max_length=128,
            logging_steps=max(1, steps // 6),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            bf16=False,
            use_cpu=not torch.cuda.is_available(),
        ),
        # The adapter's parameters are none of the model's: the optimiser gets them here, and the Trainer's clipping
        # does not see them. The scaled rate learning_rate·lora_alpha of .1 suits most models (docs/recipes.md).
        optimizers=(torch.optim.AdamW(adapter.parameters(), lr=0.1 / 64), None),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print(*(f"{loss:.3f}" for loss in main(*map(int, sys.argv[1:]))))
