"""The language model's tokenizer, built from what a checkpoint's `llm/` folder holds (NVILA-SPEC §6.1-6.3).

Published folders have no `tokenizer.json`, only vocabulary and merges of Qwen2's byte-level BPE. Media tokens are added
where they are not saved, in the reference's order, and always looked up by string. Text is encoded plainly: a control
token or media marker that a user writes stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from nvila.errors import InvalidCheckpoint, InvalidRequest

SENTINEL, IMAGE, VIDEO = "<vila/sentinel>", "<image>", "<vila/video>"
MEDIA_TOKENS = (SENTINEL, IMAGE, VIDEO)
"""In the order in which the reference adds them (llava/model/language_model/builder.py, llava/constants.py)."""

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenizer (transformers, models/qwen2/tokenization_qwen2.py)."""

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' }}"
    "{% endif %}{% for message in messages if message['content'] is not none %}{{ '<|im_start|>' + message['role'] + "
    "'\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""What the reference stores with its tokenizers (§6.2: no full stop after the system text); for folders without one."""


class ChatTokenizer:
    """Text to ids and back, and the chat template around messages.

    `backend` is the `tokenizers.Tokenizer`, set to read special tokens in text as text. `size` counts media tokens that
    were added here; ids from the checkpoint's saved vocabulary up have no embedding. `max_length`: positions that a
    model was tuned for (`model_max_length`), visual tokens included; None where the folder does not say.
    """

    def __init__(
        self,
        backend: Tokenizer,
        template: str,
        eos: str,
        bos: str | None,
        pad: str | None,
        max_length: int | None = None,
    ) -> None:
        self.backend = backend
        self.template = template
        self.max_length = max_length
        # Special again, for folders that saved them otherwise: never matched in plain text, never shown.
        backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in MEDIA_TOKENS])
        self._specials = {t.content: i for i, t in backend.get_added_tokens_decoder().items() if t.special}
        backend.encode_special_tokens = True
        self.eos_id = self.id_of(eos)
        self.bos_id = None if bos is None else self.id_of(bos)
        self.pad_id = None if pad is None else self.id_of(pad)
        self.image_id, self.video_id, self.sentinel_id = self.id_of(IMAGE), self.id_of(VIDEO), self.id_of(SENTINEL)

    @classmethod
    def open(cls, folder: Path) -> ChatTokenizer:
        """Read `llm/`; raises `InvalidCheckpoint` naming what is missing or contradicts itself."""
        settings: dict[str, Any] = _read_json(folder / "tokenizer_config.json", {})
        saved = folder / "tokenizer.json"
        backend = Tokenizer.from_file(str(saved)) if saved.exists() else _build(folder, settings)
        template = settings.get("chat_template")
        jinja = folder / "chat_template.jinja"
        if template is None and jinja.exists():
            template = jinja.read_text("utf-8")
        return cls(
            backend,
            template=template if isinstance(template, str) and _takes_text(template) else CHAT_TEMPLATE,
            eos=_content(settings.get("eos_token")) or "<|im_end|>",
            bos=_content(settings.get("bos_token")),
            pad=_content(settings.get("pad_token")),
            max_length=settings.get("model_max_length"),
        )

    @property
    def size(self) -> int:
        return int(self.backend.get_vocab_size(with_added_tokens=True))

    @property
    def media_ids(self) -> tuple[int, ...]:
        """Ids that are places, not words: never sampled."""
        return self.sentinel_id, self.image_id, self.video_id

    def id_of(self, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise InvalidCheckpoint(f"the tokenizer has no token {token!r}")
        return int(found)

    def token_of(self, token_id: int) -> str | None:
        """The token's stored form (byte-level spelling for ordinary tokens), None for an id without one."""
        token: str | None = self.backend.id_to_token(token_id)
        return token

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; control tokens and media markers in it are ordinary characters."""
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def encode_markup(self, text: str) -> list[int]:
        """Ids of trusted text, in which control tokens mean themselves."""
        return [
            i for piece in self.split_markup(text) for i in ([piece] if isinstance(piece, int) else self.encode(piece))
        ]

    def split_markup(self, text: str) -> list[int | str]:
        """Trusted text as control-token ids and the plain text between them."""
        pieces = self._special_pattern.split(text)
        return [self._specials.get(piece, piece) for piece in pieces if piece]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        text: str = self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def render(self, messages: Iterable[tuple[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The chat template around (role, content) pairs."""
        turns = [{"role": role, "content": content} for role, content in messages]
        try:
            text: str = self._compiled.render(messages=turns, add_generation_prompt=add_generation_prompt)
        except TemplateError as error:
            raise InvalidRequest(f"the chat template cannot render this conversation: {error}") from error
        return text

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """End of sequence, and whatever follows the assistant's text in the template (§6.3)."""
        answer = "\ue000"
        rendered = self.render([("user", "q"), ("assistant", answer)], add_generation_prompt=False)
        after = self.encode_markup(rendered.partition(answer)[2])
        return tuple(dict.fromkeys([self.eos_id, *after[:1]]))

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._specials, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    @cached_property
    def _compiled(self) -> Any:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        return environment.from_string(self.template)


def _takes_text(template: str) -> bool:
    """Whether messages are strings to it. Flat checkpoints may have a template that walks through lists of parts."""
    return not re.search(r"for\s+\w+\s+in\s+message(\.content|\[\s*['\"]content['\"]\s*\])", template)


def _build(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    """Qwen2's tokenizer from `vocab.json`, `merges.txt` and the lists of added tokens."""
    vocabulary: dict[str, int] = _read_json(folder / "vocab.json")
    lines = _read_text(folder / "merges.txt").splitlines()
    pairs = [line.partition(" ") for line in lines if line and not line.startswith("#version")]
    merges = [(left, right) for left, _, right in pairs]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for token_id, token in sorted(_added_tokens(folder, settings).items()):
        tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise InvalidCheckpoint(
                f"added token {token.content!r} should have id {token_id}; "
                f"after {len(vocabulary)} vocabulary entries it gets {tokenizer.token_to_id(token.content)}"
            )
    return tokenizer


def _added_tokens(folder: Path, settings: dict[str, Any]) -> dict[int, AddedToken]:
    """By id, from `tokenizer_config.json` and, for those it leaves out, `added_tokens.json`."""
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    described = {
        int(token_id): AddedToken(entry["content"], **{flag: entry[flag] for flag in flags if flag in entry})
        for token_id, entry in settings.get("added_tokens_decoder", {}).items()
    }
    listed: dict[str, int] = _read_json(folder / "added_tokens.json", {})
    roles: dict[str, Any] = _read_json(folder / "special_tokens_map.json", {})
    special = {_content(token) for role in roles.values() for token in (role if isinstance(role, list) else [role])}
    undescribed = {
        i: AddedToken(content, normalized=False, special=content in special or content.startswith("<|"))
        for content, i in listed.items()
    }
    return undescribed | described


def _content(token: Any) -> str | None:
    """A token in a configuration file is a string or a description with `content`."""
    content: str | None = token["content"] if isinstance(token, dict) else token
    return content


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InvalidCheckpoint(f"{path.parent.name}/{path.name} cannot be read: {error.strerror}") from error


def _read_json(path: Path, default: Any = None) -> Any:
    """A JSON file; `default`, where given, when there is none."""
    if default is not None and not path.exists():
        return default
    try:
        return json.loads(_read_text(path))
    except ValueError as error:
        raise InvalidCheckpoint(f"{path.parent.name}/{path.name} is not JSON: {error}") from error
