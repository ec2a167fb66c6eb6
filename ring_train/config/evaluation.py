"""Problems that a model answers, and how its answers are drawn."""

from dataclasses import dataclass, field
from typing import Any

from ring_train.config.choices import PromptFormat


@dataclass(kw_only=True)
class EvaluationConfig:
    """Evaluation by generated answers. Without problems nothing is evaluated."""

    problems: dict[str, str] = field(default_factory=dict)
    """Domain -> JSONL file of problems."""
    num_problems: int | None = None
    """Only the first so many of each file; null = all."""
    interval_steps: int = 0
    """Training answers them every so many steps and at its end; 0 = never."""
    prompt_format: PromptFormat = PromptFormat.chat
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Further variables of the chat template, e.g. enable_thinking."""
    instruction: str = ""
    """Follows the last user message, or the text, on a line of its own."""
    num_samples: int = 1
    """Answers to each problem; the accuracy is their mean."""
    temperature: float = 1.0
    """0 = greedy."""
    top_p: float = 1.0
    max_new_tokens: int = 1024
    max_batch_size: int = 64
    """Answers that one data-parallel rank generates at a time."""
    max_prefill_tokens: int = 8192
    """Prompt tokens of one forward of one data-parallel rank."""
