"""Engine: continues prompts with a model and its decode state.

    engine = Engine(model, tokenizer)
    for done in engine.generate(["def ", "class "], Sampling(max_new_tokens=40)):
        print(done.text)

Rows of a batch have lengths of their own and end separately. Equal prompts are read once and their state is forked.
With ``draft="mtp"`` the model's own predictors draft tokens that it then reads several at a time
(`torchstone.generate.speculative`); the text is the same.

Shapes: B rows, T prompt tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from torchstone.data import Tokenizer
from torchstone.errors import TorchstoneError
from torchstone.generate.compiled import CompiledStep, CompileFailed
from torchstone.generate.infilling import stand_in_of
from torchstone.generate.noise import NoiseSource, Request
from torchstone.generate.noise.seeded import SeededNoise
from torchstone.generate.sampling import Choice, Guide, History, Sampling
from torchstone.generate.speculative import Drafter, check_drafts, logits_of, padded
from torchstone.generate.text import Writer
from torchstone.model.mask import CAUSAL, Mask, mask_named
from torchstone.model.routed import routed_layers, routes_of
from torchstone.model.state import State
from torchstone.model.taps import Taps
from torchstone.model.tokens import Tokens, pick
from torchstone.model.transformer import Transformer
from torchstone.ops.compiler import compiler_works
from torchstone.train.environment import choose_device
from torchstone.train.run import RunFolder

__all__ = ["Compile", "Completion", "Engine", "Event", "Finish", "Prompts"]

Finish = Literal["stop", "length", "eos"]
"""Why a text ended: a stop string came; the tokens allowed or the model's positions are used up; an end token came."""

Compile = Literal["auto", "on", "off"]

Draft = Literal["mtp"]
"""Who drafts tokens: the predictors of `stack.multi_token`."""

Prompts = Sequence[str] | Sequence[Sequence[int]]

_PAYS = 10_000
"""Steps after which "auto" compiles: building the graph takes as long as some ten thousand steps of a small model."""
_ROOM = 256
"""New tokens for which a cache has room at first; it doubles when it is full."""


@dataclass(frozen=True)
class Completion:
    """The continuation of one prompt.

    Attributes:
        ids: new tokens as they were sampled, with the end token or the tokens of the stop string.
        text: their text, without end token, cut before a stop string; "" without a tokenizer.
        finish: why it ended.
        prompt_ids: the prompt's tokens.
        request: its name for the noise source.
        logprobs: of each of `ids` in the model's own distribution; None unless ``sampling.logprobs`` is set.
        adjusted_logprobs: of each of `ids` in the distribution that it was drawn from.
        top_logprobs: at each place the most probable tokens, as (token, log-probability), best first.
        drafted, accepted: tokens that were drafted and read, and those of them that stood; None without a draft.
        routes: experts that each token the model read was sent to, in their order, by routed layer: (prompt and new
            tokens but the last, layers, K), uint8 or, for more than 256 experts, int16. Where layers take different
            numbers of experts, K is the largest, -1 fills the others and all are int16. None unless asked for.
    """

    ids: list[int]
    text: str
    finish: Finish
    prompt_ids: list[int]
    request: Request
    logprobs: list[float] | None = None
    adjusted_logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    drafted: int | None = None
    accepted: int | None = None
    routes: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """One new token.

    Attributes:
        row: which prompt.
        token: its id.
        text: what it adds to the row's text; the pieces of a row make up the completion's text.
        logprob: in the model's own distribution, if recorded.
        finish: why the row ended, with its last token.
    """

    row: int
    token: int
    text: str
    logprob: float | None = None
    finish: Finish | None = None


@dataclass
class _Row:
    """A generation under way."""

    number: int
    request: Request
    prompt: list[int]
    memory: list[int] | None
    budget: int
    writer: Writer
    history: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    adjusted: list[float] = field(default_factory=list)
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    finish: Finish | None = None
    drafted: int = 0
    accepted: int = 0
    routes: list[np.ndarray] = field(default_factory=list)

    @property
    def step(self) -> int:
        """New tokens so far."""
        return len(self.history) - len(self.prompt)

    @property
    def fed(self) -> int:
        """Tokens that the model has read once the newest one is fed."""
        return len(self.history)

    def take(self, token: int, eos: frozenset[int]) -> str:
        """Append a token; the text it adds."""
        self.history.append(token)
        text = ""
        if token in eos:
            self.finish = "eos"
        else:
            text = self.writer.add(token)
            if self.writer.stopped:
                self.finish = "stop"
            elif self.step >= self.budget:
                self.finish = "length"
        if self.finish is not None:
            text += self.writer.end()
            if self.writer.stopped:
                self.finish = "stop"
        self.text.append(text)
        return text

    def completion(self, recorded: bool, drafted: bool) -> Completion:
        assert self.finish is not None
        return Completion(
            self.history[len(self.prompt) :],
            "".join(self.text),
            self.finish,
            self.prompt,
            self.request,
            self.logprobs if recorded else None,
            self.adjusted if recorded else None,
            self.top if recorded and self.top else None,
            self.drafted if drafted else None,
            self.accepted if drafted else None,
            np.concatenate(self.routes) if self.routes else None,
        )


class Engine:
    """Generates with one model.

    Args:
        model: a decoder or encoder-decoder with a head over the vocabulary.
        tokenizer: for texts; without one, prompts are token ids and completions have no text.
        dtype: of weights and caches. Other than the model's, it makes a copy of the weights, cast once; None takes the
            model as it is, so that a training's next weights are seen at once.
        compile: "on" compiles the decode step at once, "auto" after enough steps to pay for it, "off" never. Without a
            working compiler it steps aside with one line on stderr.
        device: where the model runs; None is where it is. Another device makes a copy.
        eos: tokens that end a text; None is the tokenizer's separator.
        start: token before everything that the decoder of an encoder-decoder writes, and what an empty prompt stands
            for; None is the tokenizer's separator.
        chunk: prompt tokens that are read at once.
        cache_bits: bits a number, on average, that growing caches are held in; lossy. None: as `dtype` has them.
        attention: which of the tokens before it a token sees. Where its reach is bounded, caches are rings of that many
            tokens, so that a text of any length takes the same memory.
        draft: "mtp" drafts tokens with the model's predictors; the text is the same, in fewer forwards, none compiled.
        front: tokens before each prompt that is a text, where the tokenizer's own template has none.

    Raises:
        TorchstoneError: the model cannot generate.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer | None = None,
        *,
        dtype: torch.dtype | None = None,
        compile: Compile = "auto",
        device: torch.device | str | None = None,
        eos: int | Iterable[int] | None = None,
        start: int | None = None,
        chunk: int = 512,
        cache_bits: int | None = None,
        attention: Mask = CAUSAL,
        draft: Draft | None = None,
        front: Sequence[int] = (),
    ) -> None:
        self._check_model(model)
        assert isinstance(model, Transformer)
        model.vocabulary_head()
        if compile not in get_args(Compile):
            raise TorchstoneError(f"generate: compile is one of {', '.join(get_args(Compile))}, not {compile!r}")
        if model.decoder is not None:
            model.check_mask(attention, decoding=True)
        if draft is not None:
            self._check_draft(model, draft, compile, attention)
        self.draft = draft
        self.source, self.tokenizer, self.compile, self.chunk = model, tokenizer, compile, max(1, chunk)
        self.cache_bits, self.front = cache_bits, list(front)
        self.attention = attention
        weight = next(model.parameters())
        self.dtype = weight.dtype if dtype is None else dtype
        self.device = weight.device if device is None else torch.device(device)
        separator = self._separator()
        self.start = separator if start is None else start
        ends = separator if eos is None else eos
        self.eos = frozenset(() if ends is None else [ends] if isinstance(ends, int) else ends)
        self.vocabulary: int = model.spec.vocabulary or 0
        self.steps = 0
        """Decode steps taken so far."""
        self.drafted = self.accepted = 0
        """Tokens that were drafted and read so far, and those of them that stood."""
        self._compiled: CompiledStep | None = None
        self._aside = compile == "off" or draft is not None
        self.refresh()

    @classmethod
    def of_run(
        cls,
        run: RunFolder,
        *,
        device: str = "cpu",
        precision: str = "fp32",
        compile: str = "auto",
        cache_bits: int | None = None,
        attention: str = "full",
        draft: Draft | None = None,
    ) -> Engine:
        """The engine of a run directory's newest weights; `attention` as in `torchstone.model.mask.mask_named`.

        Raises:
            TorchstoneError: no weights yet, a device that is not there, a precision other than fp32 and bf16, an
                attention that the model cannot honour.
        """
        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
        if precision not in dtypes:
            raise TorchstoneError(f"generate: precision is one of {', '.join(dtypes)}, not {precision!r}")
        mask, settings = mask_named(attention), run.generation_settings()
        model = run.model(device=choose_device(device), dtype=dtypes[precision])
        tokenizer = run.tokenizer() if (run.path / "tokenizer.json").is_file() else None
        seq2seq = getattr(model, "encoder", None) is not None
        start = settings.get("decoder_start_token_id" if seq2seq else "bos_token_id")
        eos = settings.get("eos_token_id")
        if seq2seq and getattr(model, "decoder", None) is None and (stand_in := stand_in_of(run)) is not None:
            from torchstone.generate.pseudo_masked import PseudoMaskedEngine

            if (cache_bits, attention, draft) != (None, "full", None):
                raise TorchstoneError(
                    "generate: cache_bits, attention and draft are for a decoder; this is an encoder with pseudo masks"
                )
            assert tokenizer is not None
            return PseudoMaskedEngine(model, tokenizer, stand_in, eos=eos)
        fronted = tokenizer is not None and not seq2seq and run.recipe.data.separated and not tokenizer.template[0]
        return cls(
            model,
            tokenizer,
            compile=compile,  # type: ignore[arg-type]
            eos=eos,
            start=start,
            cache_bits=cache_bits,
            attention=mask,
            draft=draft,
            front=tokenizer.front if tokenizer is not None and fronted else (),
        )

    @staticmethod
    def _check_model(model: nn.Module) -> None:
        if not isinstance(model, Transformer) or model.decoder is None:
            kind = getattr(model, "kind", type(model).__name__)
            raise TorchstoneError(f"generate: model {kind} is no decoder; generation needs causal: true")

    def refresh(self) -> None:
        """Take the source model's present weights: needed after they changed if the engine has a copy of them, or if it
        has compiled (compiled code holds weights as constants)."""
        weight = next(self.source.parameters())
        if (self.dtype, self.device) == (weight.dtype, weight.device):
            self.model = self.source
        else:
            self.model = copy.deepcopy(self.source).to(self.device, self.dtype).requires_grad_(False)
        self._compiled = None

    # -- what a user calls

    def generate(
        self,
        prompts: Prompts | None,
        sampling: Sampling | None = None,
        *,
        memory: Prompts | None = None,
        requests: Sequence[Request] | None = None,
        noise: NoiseSource | None = None,
        guides: Sequence[Guide] = (),
        prefix: State | None = None,
        routes: bool = False,
    ) -> list[Completion]:
        """Continue each prompt.

        Args:
            prompts: texts or token ids; an empty one means the separator alone. None with a memory: all empty.
            sampling: how; the default samples at temperature 1.
            memory: for an encoder-decoder, the encoder's inputs of each row: texts or token ids.
            requests: name of each row for the noise source; by default its number.
            noise: where randomness comes from; by default (seed, request, step).
            guides: score functions, applied to the logits in order before everything else.
            prefix: decode state of one row that stands before every prompt and is left as it is; no step is compiled.
            routes: record which experts each token is sent to; no step is compiled.

        Raises:
            TorchstoneError: a prompt that is too long or holds unknown ids, no tokenizer for a text, no prompt; routes
                of a model without routers or of drafts.
        """
        sampling = sampling or Sampling()
        if routes and (self.draft is not None or not routed_layers(self.model)):
            raise TorchstoneError(
                "routes: no layer of this model has a router"
                if self.draft is None
                else "routes: are not recorded with drafts, some of which are read in vain"
            )
        rows = self._rows(prompts, sampling, memory, requests, prefix)
        for _ in self._run(rows, sampling, noise, guides, prefix, routes):
            pass
        return [row.completion(sampling.logprobs is not None, self.draft is not None) for row in rows]

    def stream(
        self,
        prompts: Prompts | None,
        sampling: Sampling | None = None,
        *,
        memory: Prompts | None = None,
        requests: Sequence[Request] | None = None,
        noise: NoiseSource | None = None,
        guides: Sequence[Guide] = (),
        prefix: State | None = None,
    ) -> Iterator[Event]:
        """As `generate`, token by token: events of all rows in the order in which they are sampled.

        Bad input raises here, before the first event is asked for.
        """
        sampling = sampling or Sampling()
        return self._run(self._rows(prompts, sampling, memory, requests, prefix), sampling, noise, guides, prefix)

    def check(
        self, prompts: Prompts | None, sampling: Sampling | None = None, *, memory: Prompts | None = None
    ) -> None:
        """Refuse what `generate` would refuse of these: before a visit is counted that gets no answer.

        Raises:
            TorchstoneError: as `generate`.
        """
        self._rows(prompts, sampling or Sampling(), memory, None, None)

    # -- input

    @staticmethod
    def _check_draft(model: Transformer, draft: str, compile: str, attention: Mask) -> None:
        if draft not in get_args(Draft):
            raise TorchstoneError(f"draft: is {' or '.join(get_args(Draft))}, not {draft!r}")
        if compile == "on":
            raise TorchstoneError("draft: forwards of several tokens a row are not compiled; not with compile on")
        if attention.reach is not None:
            raise TorchstoneError(
                "draft: under an attention of bounded reach caches are rings, which take no token back"
            )
        check_drafts(model)

    def _separator(self) -> int | None:
        try:
            return None if self.tokenizer is None else self.tokenizer.separator
        except TorchstoneError:
            return None

    def _encoded(self, prompts: Prompts, what: str) -> list[list[int]]:
        out = []
        for number, prompt in enumerate(prompts):
            where = what if len(prompts) == 1 else f"{what} {number}"
            if isinstance(prompt, str):
                if self.tokenizer is None:
                    raise TorchstoneError(f"{where}: is a text, and the engine has no tokenizer; give token ids")
                after_start = self.model.encoder is not None and what == "prompt"
                ids = self.tokenizer.encode(prompt) if after_start else self.tokenizer.encode_input(prompt)
                ids = [self.start, *ids] if after_start and self.start is not None else [*self.front, *ids]
            else:
                ids = [int(token) for token in prompt]  # type: ignore[call-overload]
            bad = next((token for token in ids if not 0 <= token < self.vocabulary), None)
            if bad is not None:
                raise TorchstoneError(f"{where}: no token {bad} in a vocabulary of {self.vocabulary}")
            if not ids:
                if self.start is None:
                    raise TorchstoneError(f"{where}: is empty, and the engine has no tokenizer with a separator")
                ids = [self.start]
            out.append(ids)
        return out

    def _rows(
        self,
        prompts: Prompts | None,
        sampling: Sampling,
        memory: Prompts | None,
        requests: Sequence[Request] | None,
        prefix: State | None,
    ) -> list[_Row]:
        """The generations to do, checked."""
        if isinstance(prompts, str) or isinstance(memory, str):
            raise TorchstoneError("prompts: needs a list of texts or of token ids, not one text")
        if (self.model.encoder is None or self.model.decoder is None) != (memory is None):
            needs = "needs memory, the encoder's inputs" if memory is None else "has no encoder, and memory was given"
            raise TorchstoneError(f"memory: this model {needs}")
        sources = None if memory is None else self._encoded(memory, "memory")
        if prompts is None:
            if sources is None:
                raise TorchstoneError("prompts: none given")
            prompts = [""] * len(sources)
        encoded = self._encoded(prompts, "prompt")
        if sources is not None and len(sources) != len(encoded):
            raise TorchstoneError(f"memory: {len(sources)} inputs for {len(encoded)} prompts")
        names = list(range(len(encoded))) if requests is None else list(requests)
        if len(names) != len(encoded):
            raise TorchstoneError(f"requests: {len(names)} names for {len(encoded)} prompts")
        if sampling.stop and self.tokenizer is None:
            raise TorchstoneError("stop: stop strings are found in text, and the engine has no tokenizer")
        if prefix is not None and self.draft is not None:
            raise TorchstoneError("prefix: has no hidden states of its tokens, of which drafts are made")
        if prefix is not None and prefix.rows != 1:
            raise TorchstoneError(f"prefix: needs a state of one row, this one has {prefix.rows}")
        before = 0 if prefix is None else prefix.reach
        limit = self.model.limit
        rows = []
        for number, ids in enumerate(encoded):
            self._check_length(len(ids), "prompt", number, len(encoded), limit, before)
            source = None if sources is None else sources[number]
            if source is not None:
                assert self.model.encoder is not None
                self._check_length(len(source), "memory", number, len(encoded), self.model.encoder.limit)
            budget = self._budget(ids, sampling.max_new_tokens, None if limit is None else limit - before)
            writer = Writer(self.tokenizer, sampling.stop)
            rows.append(_Row(number, names[number], ids, source, budget, writer, list(ids)))
        return rows

    def _budget(self, ids: list[int], asked: int, limit: int | None) -> int:
        """New tokens, at most, of a prompt. Every token but the last is fed back, so the last one needs no position."""
        return asked if limit is None else min(asked, limit - len(ids) + 1)

    @staticmethod
    def _check_length(length: int, what: str, number: int, of: int, limit: int | None, before: int = 0) -> None:
        if limit is not None and before + length > limit:
            where, taken = what if of == 1 else f"{what} {number}", f", and {before} are taken" if before else ""
            raise TorchstoneError(f"{where} of {length} tokens is too long: the model knows {limit} positions{taken}")

    # -- the loop

    def _run(
        self,
        rows: list[_Row],
        sampling: Sampling,
        noise: NoiseSource | None,
        guides: Sequence[Guide],
        prefix: State | None,
        routes: bool = False,
    ) -> Iterator[Event]:
        if not rows:
            return
        if self.draft is not None:
            yield from self._run_drafted(rows, sampling, SeededNoise(sampling.seed) if noise is None else noise, guides)
            return
        # a compiled step knows no columns: it takes the place of a token for its position
        compiled = self._compiled_step(max(row.budget for row in rows)) if prefix is None and not routes else None
        noise = SeededNoise(sampling.seed) if noise is None else noise
        plain = sampling.plain and not guides
        held = 0 if prefix is None else prefix.longest
        need = held + max(len(row.prompt) + row.budget - 1 for row in rows)
        live, step = list(rows), 0
        spare = 0 if compiled is None else 1  # slots that a compiled step wants beyond the newest token's
        state, logits_BV = self._read(rows, need, spare, prefix, routes=routes)
        if compiled is not None:
            compiled.settle(state)
        seen_BV = self._seen(rows) if sampling.repetition_penalty != 1.0 else None
        add_B = torch.ones(len(rows), dtype=torch.int64, device=self.device)
        best_B: torch.Tensor | None = None
        while True:
            if plain:
                ids_B, choice = logits_BV.argmax(-1) if best_B is None else best_B, None
            else:
                history = History([row.request for row in live], step, [row.history for row in live], seen_BV)
                choice = self._choose(sampling, logits_BV, history, noise, guides)
                ids_B = choice.ids_B
            ended = yield from self._take(live, ids_B, choice)
            step += 1
            left = [b for b, row in enumerate(live) if row.finish is None]
            if not left:
                return
            if ended:
                keep = self._keep(left, len(live), compiled is not None)
                if len(keep) < len(live):
                    keep_N = torch.tensor(keep, device=self.device)
                    state, ids_B, add_B = state.fork(keep_N), ids_B[keep_N], add_B[keep_N]
                    seen_BV = None if seen_BV is None else seen_BV[keep_N]
                    live = [live[b] for b in keep]
                idle = torch.tensor([row.finish is not None for row in live], device=self.device)
                if idle.any():  # rows that stay only for the shape stand still on their first slot
                    add_B = torch.where(idle, 0, add_B)
                    state.length_B = torch.where(idle, 0, state.length_B)
            if seen_BV is not None:
                seen_BV[torch.arange(len(live), device=self.device), ids_B] = True
            longest = held + max(len(row.history) for row in live if row.finish is None) - 1
            if longest + 1 + spare > state.extent:
                state.extend(min(need + spare, 2 * state.extent))
            self.steps += 1
            try:
                taps = self._route_taps(routes)
                logits_BV, best_B = self._decode(compiled, state, ids_B, add_B, longest, taps)
                if taps is not None:
                    for row, chosen in zip(live, self._routes(taps), strict=True):
                        row.routes.append(chosen)
            except CompileFailed as error:
                self._step_aside(str(error))
                compiled = None
                logits_BV, best_B = self._decode(None, state, ids_B, add_B, longest)

    def _run_drafted(
        self, rows: list[_Row], sampling: Sampling, noise: NoiseSource, guides: Sequence[Guide]
    ) -> Iterator[Event]:
        """As `_run`, with drafts: rows take different numbers of tokens from one forward."""
        live, need = list(rows), max(len(row.prompt) + row.budget - 1 for row in rows)
        kept: list[torch.Tensor] = []
        state, logits_BV = self._read(rows, need, 0, None, kept)
        hidden_BTD, logits_BTV = torch.cat(kept, 1), logits_BV[:, None]
        drafter = Drafter(self.model, len(rows), state.extent, self.cache_bits)
        seen_BV = self._seen(rows) if sampling.repetition_penalty != 1.0 else None
        drafting, plain = sampling.model_copy(update={"logprobs": None}), sampling.plain and not guides
        drafts: list[list[int]] = [[] for _ in rows]

        def pick_of(
            some: list[int], logits_NV: torch.Tensor, texts: list[list[int]], step: int, how: Sampling
        ) -> Choice:
            if plain:
                return Choice(logits_NV.argmax(-1))
            seen_NV = None if seen_BV is None else seen_BV[some]
            history = History([live[b].request for b in some], step, [texts[b] for b in some], seen_NV)
            return self._choose(how, logits_NV, history, noise, guides)

        def guess(logits_BV: torch.Tensor, texts: list[list[int]]) -> list[int]:
            tokens = [0] * len(live)
            for some in self._by_step(live, range(len(live))):
                step = len(texts[some[0]]) - len(live[some[0]].prompt)
                found = pick_of(some, logits_BV[some], texts, step, drafting)
                for b, token in zip(some, found.ids_B.tolist(), strict=True):
                    tokens[b] = token
            return tokens

        while True:
            going = list(range(len(live)))
            for j in range(logits_BTV.shape[1]):
                taking, going = going, []
                for some in self._by_step(live, taking):
                    texts = [row.history for row in live]
                    choice = pick_of(some, logits_BTV[some, j], texts, live[some[0]].step, sampling)
                    yield from self._take([live[b] for b in some], choice.ids_B, choice)
                    if seen_BV is not None:
                        seen_BV[torch.tensor(some, device=self.device), choice.ids_B] = True
                    going += [b for b in some if self._stands(live[b], drafts[b], j)]
            left = [b for b, row in enumerate(live) if row.finish is None]
            if not left:
                return
            if len(left) < len(live):
                left_N = torch.tensor(left, device=self.device)
                state, hidden_BTD = state.fork(left_N), hidden_BTD[left_N]
                seen_BV = None if seen_BV is None else seen_BV[left_N]
                drafter.keep(left)
                live = [live[b] for b in left]
            state.truncate(torch.tensor([len(row.history) - 1 for row in live], device=self.device))
            drafts = drafter.draft([row.history for row in live], hidden_BTD, guess)
            room = max(row.budget - row.step for row in live) - 1
            if self.model.limit is not None:
                room = min(room, self.model.limit - state.longest - 1)
            drafts = [draft[:room] for draft in drafts]
            ids_BT = torch.tensor([[row.history[-1], *draft] for row, draft in zip(live, drafts, strict=True)])
            if state.longest + ids_BT.shape[1] > state.extent:
                state.extend(max(state.longest + ids_BT.shape[1], min(need, 2 * state.extent)))
            self.steps += 1
            hidden_BTD, logits_BTV = self._verify(state, ids_BT.to(self.device))

    @torch.no_grad()
    def _verify(self, state: State, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states and logits of the newest tokens and the drafts behind them."""
        out = self.model(ids_BT, state=state)
        assert out.logits is not None
        return out.hidden, out.logits

    @staticmethod
    def _by_step(live: list[_Row], some: Iterable[int]) -> list[list[int]]:
        """Numbers of rows, by how many new tokens they have: noise goes by that."""
        found: dict[int, list[int]] = {}
        for b in some:
            found.setdefault(live[b].step, []).append(b)
        return list(found.values())

    def _stands(self, row: _Row, draft: list[int], j: int) -> bool:
        """Whether draft `j` is the token that the row has just taken, so that what was read after it counts."""
        if j >= len(draft) or row.finish is not None:
            return False
        stands = draft[j] == row.history[-1]
        tried = 1 if stands else len(draft) - j
        row.drafted, row.accepted = row.drafted + tried, row.accepted + stands
        self.drafted, self.accepted = self.drafted + tried, self.accepted + stands
        return stands

    def _take(self, live: list[_Row], ids_B: torch.Tensor, choice: Choice | None) -> Generator[Event, None, bool]:
        """Give every unfinished row its token; returns whether any row ended."""
        tokens = ids_B.tolist()
        recorded = choice is not None and choice.logprobs_B is not None
        if recorded:
            assert choice is not None and choice.logprobs_B is not None and choice.adjusted_B is not None
            own, adjusted = choice.logprobs_B.tolist(), choice.adjusted_B.tolist()
            if choice.best_Bn is not None and choice.best_logprobs_Bn is not None:
                pairs = zip(choice.best_Bn.tolist(), choice.best_logprobs_Bn.tolist(), strict=True)
                top = [list(zip(*pair, strict=True)) for pair in pairs]
            else:
                top = None
        ended = False
        for b, row in enumerate(live):
            if row.finish is not None:
                continue
            text = row.take(tokens[b], self.eos)
            if recorded:
                row.logprobs.append(own[b])
                row.adjusted.append(adjusted[b])
                if top is not None:
                    row.top.append(top[b])
            ended = ended or row.finish is not None
            yield Event(row.number, tokens[b], text, own[b] if recorded else None, row.finish)
        return ended

    @staticmethod
    def _keep(left: list[int], rows: int, compiled: bool) -> list[int]:
        """Rows that stay in the batch. A compiled step keeps ended rows until they are half of it, and never falls to
        one row, which would be a graph of its own."""
        if not compiled:
            return left
        if rows <= 2 or 2 * len(left) > rows:
            return list(range(rows))
        return left if len(left) > 1 else sorted([*left, next(b for b in range(rows) if b not in left)])

    @torch.no_grad()
    def _choose(
        self, sampling: Sampling, logits_BV: torch.Tensor, history: History, noise: NoiseSource, guides: Sequence[Guide]
    ) -> Choice:
        return sampling.choose(logits_BV, history, noise, guides)

    @torch.no_grad()
    def _read(
        self,
        rows: list[_Row],
        need: int,
        spare: int,
        prefix: State | None,
        kept: list[torch.Tensor] | None = None,
        routes: bool = False,
    ) -> tuple[State, torch.Tensor]:
        """State after the prompts and logits (B, V) of what follows; equal rows are read once.

        `kept`, if given, gets the prompts' hidden states (B, T, D). With `routes` rows keep theirs.
        """
        unique: dict[tuple[Any, ...], int] = {}
        which = [
            unique.setdefault((tuple(row.prompt), None if row.memory is None else tuple(row.memory)), len(unique))
            for row in rows
        ]
        firsts = [rows[which.index(u)] for u in range(len(unique))]
        ids_BT, valid_BT = padded([row.prompt for row in firsts], self.device)
        memory = None
        if firsts[0].memory is not None:
            source_BS, source_valid = padded([row.memory or [] for row in firsts], self.device)
            memory = Tokens.of(source_BS, valid=source_valid)
        T = ids_BT.shape[1]
        if prefix is None:
            state = self.model.state(
                len(firsts), min(need, T + _ROOM), cache_bits=self.cache_bits, mask=self.attention
            )  # fmt: skip
            state.extend(state.extent + spare)
        else:
            state = prefix.fork(torch.zeros(len(firsts), dtype=torch.int64, device=self.device))
            state.extend(min(need, prefix.longest + T + _ROOM))
        logits_BV: torch.Tensor | None = None
        for a in range(0, T, self.chunk):
            b = min(a + self.chunk, T)
            piece = ids_BT[:, a:b]
            valid = None if valid_BT is None else valid_BT[:, a:b]
            inputs = Tokens.of(piece, valid=valid)
            taps = self._route_taps(routes)
            out = self.model(
                inputs,
                taps=taps,
                state=state,
                mask=self.attention,
                outputs="last" if kept is None else "none",
                memory=memory if a == 0 else None,
            )
            if taps is not None:
                chosen_BTLK = self._routes(taps)
                for row, u in zip(rows, which, strict=True):
                    row.routes.append(chosen_BTLK[u, : max(0, len(row.prompt) - a)])
            if kept is None:
                assert out.logits is not None
                new = out.logits[:, -1]
            else:
                kept.append(out.hidden)
                newest = inputs.newest(len(firsts))
                new = logits_of(self.model, pick(out.hidden, newest), inputs.pick(newest))[:, -1]
            # a row that ended in an earlier chunk has nothing here, and keeps what followed its own last token
            logits_BV = new if logits_BV is None or valid is None else torch.where(valid[:, :1], new, logits_BV)
        assert logits_BV is not None
        if len(firsts) < len(rows):
            order = torch.tensor(which, device=self.device)
            state, logits_BV = state.fork(order), logits_BV[order]
            if kept is not None:
                kept[:] = [x_BTD[order] for x_BTD in kept]
        return state, logits_BV

    def _seen(self, rows: list[_Row]) -> torch.Tensor:
        seen_BV = torch.zeros(len(rows), self.vocabulary, dtype=torch.bool)
        for b, row in enumerate(rows):
            seen_BV[b, row.prompt] = True
        return seen_BV.to(self.device)

    @torch.no_grad()
    def _decode(
        self,
        compiled: CompiledStep | None,
        state: State,
        ids_B: torch.Tensor,
        add_B: torch.Tensor,
        longest: int,
        taps: Taps | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Feed each row its newest token: logits (B, V), and their argmax where it comes for nothing."""
        if compiled is not None:
            best_B, logits_BV = compiled(state, ids_B, add_B, longest)
            return logits_BV, best_B
        out = self.model(ids_B[:, None], state=state, mask=self.attention, outputs="last", taps=taps)
        assert out.logits is not None
        return out.logits[:, -1], None

    @staticmethod
    def _route_taps(routes: bool) -> Taps | None:
        return Taps(record=["decoder.layers.*.router.experts"]) if routes else None

    def _routes(self, taps: Taps) -> np.ndarray:
        """Choices (B, T, L, K) of one forward, in the order of their numbers."""
        routers = routed_layers(self.model).values()
        few = all(router.E <= 256 for router in routers) and len({router.K for router in routers}) == 1
        return routes_of(self.model, taps.seen).cpu().numpy().astype(np.uint8 if few else np.int16)

    def _compiled_step(self, steps: int) -> CompiledStep | None:
        """The compiled step, if it is wanted, pays and works."""
        if self._aside or (self._compiled is None and self.compile == "auto" and self.steps + steps < _PAYS):
            return None
        if self._compiled is None:
            reason = compiler_works()
            if reason is not None:
                self._step_aside(reason)
                return None
            self._compiled = CompiledStep(self.model, mask=self.attention)
        return self._compiled

    def _step_aside(self, reason: str) -> None:
        """Never compile again, and say so in one line."""
        self._aside, self._compiled = True, None
        print(f"torch.compile steps aside: {reason}", file=sys.stderr)
