"""What can be wrong with an evaluation by generated answers, before a problem is read."""

from ring_train.config import Config, PromptFormat
from ring_train.plan.batch import context_tokens


def evaluation_problems(config: Config) -> list[str]:
    """Return which values of `evaluation` contradict each other or the rest of a run."""
    evaluation = config.evaluation
    interval = evaluation.interval_steps
    if not evaluation.problems:
        return [
            f"evaluation.interval_steps={interval}, but evaluation.problems is empty; "
            "add evaluation.problems.DOMAIN=FILE, or set the interval to 0"
        ] * bool(interval)
    problems = []
    if not config.data.tokenizer:
        problems.append(
            "data.tokenizer is empty, and evaluation.problems are made into tokens by it; "
            "name the folder of the tokenizer"
        )
    if evaluation.temperature == 0 and evaluation.num_samples > 1:
        problems.append(
            f"evaluation.num_samples={evaluation.num_samples} answers are all the same with "
            "evaluation.temperature=0; set num_samples=1 or a temperature above 0"
        )
    if evaluation.prompt_format is PromptFormat.text and evaluation.template_arguments:
        problems.append(
            f"evaluation.template_arguments={evaluation.template_arguments} are for the chat "
            "template, which evaluation.prompt_format=text does not use; remove one of the two"
        )
    context = context_tokens(config.model, config.model.rotary_scaling_factor)
    if evaluation.max_new_tokens >= context:
        problems.append(
            f"evaluation.max_new_tokens={evaluation.max_new_tokens} leaves no room for a prompt in "
            f"the model's context of {context} tokens; choose less"
        )
    return problems
