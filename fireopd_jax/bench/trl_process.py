"""The process in which TRL trains: `python -m fireopd_jax.bench.trl_process STEP.json`.

    a line on standard input -> one step of GKDTrainer -> its seconds, a line on standard output

A step is on-policy generation, the teacher's forward pass, the loss over the whole vocabulary, the
backward pass and AdamW, in float32, without gradient checkpointing so that generation has a cache.
JAX is not imported.
"""

# torch and trl are needed only here: types are checked where neither is installed.
# pyright: reportMissingImports=false

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

STEP = "STEP "
TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def main(file: Path) -> None:
    """Train as the file describes, a step for each line, until the input ends."""
    warnings.filterwarnings("ignore")
    described = json.loads(file.read_text(encoding="utf-8"))
    trainer(described).train()


def trainer(described: dict[str, Any]) -> Any:
    """Return the trainer of the models and requests; all requests are one batch."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(described[name], dtype=torch.float32)
        for name in ("student", "teacher")
    )
    prompts, lengths, steps = (described[name] for name in ("prompts", "lengths", "steps"))
    messages = [
        [
            {"role": "user", "content": " ".join(map(str, prompt))},
            {"role": "assistant", "content": "0"},
        ]
        for prompt in prompts
    ]
    made = GKDTrainer(
        model=student,
        teacher_model=teacher,
        train_dataset=Dataset.from_dict({"messages": messages * steps}),
        processing_class=tokenizer(described["vocabulary"]),
        callbacks=[turns()],
        args=GKDConfig(
            output_dir=described["output"],
            per_device_train_batch_size=len(prompts),
            max_steps=steps,
            max_new_tokens=max(lengths),
            max_length=max(map(len, prompts)) + max(lengths),
            learning_rate=described["learning_rate"],
            lmbda=1.0,
            beta=1.0,
            temperature=1.0,
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            fp16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=steps + 1,
            disable_tqdm=True,
        ),
    )
    last = described["vocabulary"] - 1
    made.generation_config.eos_token_id = last
    made.generation_config.suppress_tokens = [last]  # responses end at their lengths only
    stop_at_lengths(student, prompts, lengths)
    return made


def tokenizer(vocabulary: int) -> Any:
    """Return a tokenizer whose tokens are the numbers of its vocabulary, with spaces between."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {str(number): number for number in range(vocabulary)}
    core = Tokenizer(models.WordLevel(words, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    last = str(vocabulary - 1)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=last, eos_token=last, padding_side="left"
    )
    made.chat_template = TEMPLATE
    return made


def stop_at_lengths(student: Any, prompts: list[list[int]], lengths: list[int]) -> None:
    """Make the model's `generate` end each response at the length that its prompt asks for."""
    import torch
    from transformers import StoppingCriteria, StoppingCriteriaList

    asked = {tuple(prompt): length for prompt, length in zip(prompts, lengths, strict=True)}
    generate = student.generate

    class Lengths(StoppingCriteria):
        def __init__(self, ids: Any, mask: Any):
            rows = zip(ids, mask, strict=True)
            found = [asked[tuple(row[there.bool()].tolist())] for row, there in rows]
            self.width, self.length = ids.shape[1], torch.tensor(found)

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return input_ids.shape[1] - self.width >= self.length

    def until_lengths(*, input_ids: Any, attention_mask: Any, **kwargs: Any) -> Any:
        criteria = StoppingCriteriaList([Lengths(input_ids, attention_mask)])
        return generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            stopping_criteria=criteria,
            **kwargs,
        )

    student.generate = until_lengths


def turns() -> Any:
    """Return the callback that waits for a line before each step, and prints its seconds."""
    from transformers import TrainerCallback

    class Turns(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            if not sys.stdin.readline():
                raise SystemExit
            self.wall, self.cpu = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            cpu, wall = time.process_time() - self.cpu, time.perf_counter() - self.wall
            print(STEP + json.dumps({"cpu": cpu, "wall": wall}), flush=True)

    return Turns()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
