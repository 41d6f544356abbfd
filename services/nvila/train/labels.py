"""Which positions of a conversation are to be learned (NVILA-SPEC §6.6).

Follows `preprocess_conversation` in llava/utils/tokenizer.py of NVlabs/VILA: what the conversation holds beyond its own
template with empty answers is the answers. So an answer's text and the token that closes it are targets, the newline
after it is not. Matching is greedy from left to right: where an answer begins with what the template has next, a token
of it is taken for the template's, and a later one becomes a target in its stead.

P prompt positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nvila.model.config import NvilaConfig
from nvila.model.prompt import Block, Layout, TextIds, compose, message_contents
from nvila.model.tokenizer import ChatTokenizer
from nvila.train.loss import IGNORE
from nvila.types import Message, PromptMedia, Role

Token = int | Block
"""A text id, or a block of visual tokens, which is matched as a whole."""


@dataclass(frozen=True)
class Labelled:
    """A complete conversation. `labels`: one per position of the layout, `IGNORE` where nothing is to be learned."""

    layout: Layout
    labels: tuple[int, ...]


def label_answers(
    messages: Sequence[Message], media: Sequence[PromptMedia], tokenizer: ChatTokenizer, config: NvilaConfig
) -> Labelled:
    """Lay a conversation out and label its answers.

    Visual tokens and what surrounds them are never targets. Nothing is, if answers and template cannot be told apart.
    Raises `InvalidRequest` as `lay_out` does.
    """
    contents = message_contents(messages, media, config)
    roles = [message.role for message in messages]
    layout = compose(roles, contents, tokenizer, add_generation_prompt=False)
    unanswered = [
        [tokenizer.sentinel_id] if role is Role.ASSISTANT else content
        for role, content in zip(roles, contents, strict=True)
    ]
    template = list(_tokens(compose(roles, unanswered, tokenizer, add_generation_prompt=False)))
    tokens = list(_tokens(layout))
    unmatched = _beyond(tokens, _without_answers(template, tokenizer.sentinel_id, before=0))
    if unmatched is None:  # an answer may have merged with the token before it
        unmatched = _beyond(tokens, _without_answers(template, tokenizer.sentinel_id, before=1))
    labels: list[int] = []
    for place, token in enumerate(tokens):
        if isinstance(token, Block):
            labels += [IGNORE] * token.positions
        else:
            labels.append(token if unmatched is not None and unmatched[place] else IGNORE)
    return Labelled(layout, tuple(labels))


def _tokens(layout: Layout) -> Iterator[Token]:
    for segment in layout.segments:
        if isinstance(segment, TextIds):
            yield from segment.ids
        else:
            yield segment


def _without_answers(template: Sequence[Token], sentinel_id: int, *, before: int) -> list[Token]:
    """Each sentinel taken out, with the token after it and `before` tokens before it."""
    at = [place for place, token in enumerate(template[:-1]) if token == sentinel_id]
    gone = {place for sentinel in at for place in range(sentinel - before, sentinel + 2)}
    return [token for place, token in enumerate(template) if place not in gone]


def _beyond(tokens: Sequence[Token], template: Sequence[Token]) -> list[bool] | None:
    """For each token, whether it is beyond the template; None where the template is not used up."""
    used = 0
    beyond = []
    for token in tokens:
        is_next = used < len(template) and token == template[used]
        used += is_next
        beyond.append(not is_next)
    return beyond if used == len(template) else None
