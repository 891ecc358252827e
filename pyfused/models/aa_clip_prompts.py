"""What AA-CLIP says about a class of objects in either state."""

from __future__ import annotations

from collections.abc import Sequence

NORMAL_STATES = ("{}", "a {}", "the {}")
ABNORMAL_STATES = ("a damaged {}", "a broken {}", "a {} with flaw", "a {} with defect", "a {} with damage")
TEMPLATES = ("{}.", "a photo of {}.")


def anomaly_prompts(
    name: str,
    normal: Sequence[str] = NORMAL_STATES,
    abnormal: Sequence[str] = ABNORMAL_STATES,
    templates: Sequence[str] = TEMPLATES,
) -> tuple[list[str], list[str]]:
    """Each state of ``name`` in each template: (3 x 2 prompts, 5 x 2 prompts) by default, for a tokenizer.

    Args:
        name: what the class is called in words, such as "speckled tile surface".
        normal, abnormal: the two kinds of states, with {} for the name.
        templates: sentences, with {} for the state.

    Raises:
        TypeError: an argument is not of strings.
        ValueError: there is no name, a kind has no state, there is no template, or one of them lacks its {}.

    Source: the prompts of AA-CLIP (Ma et al., 2025).
    """
    if not isinstance(name, str):
        raise TypeError(f"anomaly_prompts: name must be a str, got {type(name).__name__}")
    if not name.strip():
        raise ValueError(f"anomaly_prompts: name must say what the class is, got {name!r}")
    for argument, given in (("normal", normal), ("abnormal", abnormal), ("templates", templates)):
        if isinstance(given, str) or not all(isinstance(part, str) for part in given):
            raise TypeError(f"anomaly_prompts: {argument} must be a sequence of str, got {given!r}")
        if not given or not all(part.count("{}") == 1 for part in given):
            raise ValueError(
                f"anomaly_prompts: {argument} must be strings with one {{}} each, at least one, got {given}"
            )

    def sentences(states: Sequence[str]) -> list[str]:
        return [template.format(state.format(name)) for state in states for template in templates]

    return sentences(normal), sentences(abnormal)
