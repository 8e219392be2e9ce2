"""How lm-evaluation-harness reaches a model: its own class for every model of transformers, made faster for a Doge.

That class pads batches of so many rows to their longest, and takes the softmax of 32,768 logits at every position. For
a small model that is more work than the model itself. Here a batch holds so many tokens of rows of nearly one length,
and the head sees the positions alone at which an answer's tokens are predicted. Rows that are equal but for the last
token, as answers of one letter are, are read once.

Shapes, the legend of this file:

    B  rows of a batch          d  hidden size
    T  tokens of its longest    P  positions whose next token is looked at
"""

import contextlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import chain, groupby
from typing import Any, NamedTuple, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from doge_lm.data.tokenizer import StreamDecoder, encode_batch
from doge_lm.errors import UserError
from doge_lm.inference.decoding import Decoder, Sampling
from doge_lm.model.modeling_doge import DogeForCausalLM

# Positions whose logits are held at a time: 0.25 GB in float32 at a vocabulary of 32,768.
_HEAD_POSITIONS = 2048
# Rows of a generated batch for each such number of tokens of a batch.
_TOKENS_OF_A_ROW = 512

# Tokens between two looks for stops in what was written.
_LOOK_EVERY = 16
# What a request says that is written greedily.
_GREEDY = {"do_sample", "temperature", "until", "max_gen_toks"}

T = TypeVar("T")

# As lm-evaluation-harness gives it: the texts (None for windows of a long one), ids of the context and of the rest.
Request = tuple[Any, list[int], list[int]]


class _Row(NamedTuple):
    """Ids that the model reads once, for some requests.

    Attributes:
        ids: the context and the continuation without its last token, cut from the left.
        first: the first position whose next token is looked at.
        requests: (index, continuation) of each request; its tokens are those behind the last positions.
    """

    ids: tuple[int, ...]
    first: int
    requests: list[tuple[int, list[int]]]


class _Asked(NamedTuple):
    """A batch that the device works on: for every token of its continuations, in order.

    Attributes:
        requests: the index of its request.
        log_likelihood: in nats, on the device.
        likeliest: whether no other token is likelier, on the device.
    """

    requests: list[int]
    log_likelihood: Tensor
    likeliest: Tensor


def make_scorer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int, progress: bool = False
) -> "PlainScorer":
    """A model as lm-evaluation-harness takes it.

    Args:
        model: on its device.
        tokenizer: its tokenizer.
        batch_tokens: tokens of one forward pass. A model of another architecture takes a fixed number of rows, as many
            as hold so many tokens at 512 each.
        progress: show how far the scoring of a task has come.
    """
    keep_quiet()
    kind = DogeScorer if isinstance(model, DogeForCausalLM) else PlainScorer
    return kind(model, tokenizer, batch_tokens, progress)


def keep_quiet() -> None:
    """Leave out what the harness warns of in every run: that a model was given as an object, for one."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


class _AllEndedError(Exception):
    """No row of a batch needs another token; it ends the decoder's work."""


class _Written:
    """What a model writes behind a context, up to its end token or one of the stops.

    It keeps the blank of its first word, which is indentation in a program.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, stops: Sequence[str]) -> None:
        self._end = tokenizer.eos_token_id
        self._stops = [stop for stop in stops if stop]
        self._spelling = StreamDecoder(tokenizer, continues=True)
        self._text = ""
        self._ended = False

    def put(self, token: int) -> None:
        """Take the next token; those behind the end are no more of it."""
        self._ended = self._ended or token == self._end
        if not self._ended:
            self._text += self._spelling.put(token)

    def is_done(self) -> bool:
        """Whether no further token can matter."""
        return self._ended or any(stop in self._text for stop in self._stops)

    def until_stop(self) -> str:
        """The text before the first stop; no token may come after."""
        whole = self._text + self._spelling.end()
        return min((whole.split(stop, maxsplit=1)[0] for stop in self._stops), key=len, default=whole)


class PlainScorer(HFLM):
    """The harness's own class, with a batch size by tokens; see `make_scorer`."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int, progress: bool
    ) -> None:
        rows = max(1, batch_tokens // _TOKENS_OF_A_ROW)
        super().__init__(model, backend="causal", tokenizer=tokenizer, batch_size=rows)
        self.batch_tokens = batch_tokens
        self.cut_requests = 0
        """Requests whose beginning was left out, since they do not fit into the model's positions."""
        self.shows_progress = progress

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        self._look_over(requests)
        answers = super()._loglikelihood_tokens(list(requests), disable_tqdm, override_bs)
        refuse_no_numbers(log_likelihood for log_likelihood, _ in answers)
        return answers

    def _look_over(self, requests: Sequence[Request]) -> None:
        """Count those that are cut, refuse those that cannot be scored."""
        most = int(self.max_length)
        for texts, context, continuation in requests:
            if not context or not 0 < len(continuation) <= most:
                what = "a text" if texts is None else f"the answer {texts[1][:60]!r}"
                raise UserError(
                    f"{what} has {len(continuation):,} tokens, and the model scores from 1 to {most:,} (its positions)"
                    "; leave the task out, or the row"
                )
            self.cut_requests += len(context) + len(continuation) > most + 1

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Contexts and continuations as requests; an empty context becomes the token that begins a text."""
        requests: list[Request] = []
        for context, continuation in pairs:
            if context:
                ids, rest = self._encode_pair(context, continuation)
            else:
                ids, rest = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            requests.append(((context, continuation), ids, rest))
        return requests

    def score(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation in nats, and whether each of its tokens is the likeliest."""
        return self._loglikelihood_tokens(requests, not self.shows_progress)

    def score_windows(self, windows: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """The log-likelihood of each second part behind its first, in nats; both of at least one token."""
        requests: list[Request] = [(None, context, rest) for context, rest in windows]
        return [log_likelihood for log_likelihood, _ in self.score(requests)]


class DogeScorer(PlainScorer):
    """The same scores for a Doge, with the softmax in float32; see the module."""

    _chat = False

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of the template, as the harness asks for it; from now on contexts are such texts."""
        self._chat = True
        return super().apply_chat_template(chat_history, add_generation_prompt)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of whole contexts, with `<s>`. Only in what the chat template wrote are control tokens such."""
        if not texts:
            return []
        if self._chat:  # it writes its own <s>, and has escaped what stands in the turns
            found: list[list[int]] = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
            return found
        return [[self.prefix_token_id, *ids] for ids in encode_batch(self.tokenizer, texts)]

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation behind its context, as the harness asks for it."""
        return self._loglikelihood_tokens(self.encode_pairs([request.args for request in requests]), disable_tqdm)

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """The same with every text tokenized once, in batches: one by one takes longer than a small model on a GPU.

        Blanks at the end of a context go to the continuation, whose first token they belong to, as the harness has it.
        """
        asked = list(pairs)
        if self._chat:  # as the template does, and the harness does not
            asked = [(context, rest if rest[:1].isspace() else f" {rest}") for context, rest in pairs]
        kept = [context.rstrip() for context, _ in asked]
        whole = [context + continuation for context, continuation in asked]
        texts = list(dict.fromkeys([*kept, *whole]))
        ids = dict(zip(texts, self._ids(texts), strict=True))
        return [
            (tuple(pair), ids[before], ids[together][len(ids[before]) :])
            for pair, before, together in zip(pairs, kept, whole, strict=True)
        ]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each context, up to the first of the request's stops.

        Greedy requests are written by this project's `Decoder`, which keeps its cache, and on a GPU its captured step,
        from batch to batch; others as the harness does it.
        """
        wishes = [normalize_gen_kwargs(dict(request.args[1]), self.max_gen_toks) for request in requests]
        if any(wish.keys() - _GREEDY or wish.get("do_sample") or wish.get("temperature") for wish in wishes):
            return super().generate_until(list(requests), disable_tqdm)
        prompts = self._ids([request.args[0] for request in requests])
        texts = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: (wishes[i]["max_gen_toks"], -len(prompts[i])))
        with tqdm(total=len(requests), disable=disable_tqdm or not self.shows_progress) as bar:
            for _, group in groupby(order, lambda i: wishes[i]["max_gen_toks"]):
                indices = list(group)
                for start in range(0, len(indices), self.batch_size):
                    batch = indices[start : start + self.batch_size]
                    written = self._write([prompts[i] for i in batch], [wishes[i] for i in batch])
                    for i, text in zip(batch, written, strict=True):
                        texts[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.update(len(batch))
        return texts

    def _write(self, prompts: list[list[int]], wishes: list[Mapping[str, Any]]) -> list[str]:
        """Continue prompts with the same number of tokens until each has come to one of its stops."""
        most = wishes[0]["max_gen_toks"]
        room = int(self.max_length) - most
        self.cut_requests += sum(len(ids) > room for ids in prompts)
        kept = [ids[-room:] for ids in prompts]
        rows = [_Written(self.tokenizer, wish["until"]) for wish in wishes]
        steps = 0

        def take(tokens: list[int]) -> None:
            nonlocal steps
            steps += 1
            for row, token in zip(rows, tokens, strict=True):
                row.put(token)
            if steps % _LOOK_EVERY == 0 and all(row.is_done() for row in rows):
                raise _AllEndedError

        end = self.tokenizer.eos_token_id
        with contextlib.suppress(_AllEndedError):
            self._decoder.generate(kept, Sampling(max_new_tokens=most), eos_token_id=end, on_tokens=take)
        return [row.until_stop() for row in rows]

    @cached_property
    def _decoder(self) -> Decoder:
        return Decoder(self.model)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation in nats, and whether it is the likeliest, token by token.

        `override_bs` is a number of rows, which has no meaning here.
        """
        self._look_over(requests)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm or not self.shows_progress) as bar:
            asked = map(self._ask, batches(make_rows(requests, self.max_length), self.batch_tokens))
            for request, answer in chain.from_iterable(map(_read, one_ahead(asked))):
                answers[request] = answer
                texts = requests[request][0]
                if texts is not None:  # a window of a long text is kept by who asked for the whole
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
                bar.update()
        refuse_no_numbers(log_likelihood for log_likelihood, _ in answers)
        return answers

    def _ask(self, rows: list[_Row]) -> _Asked:
        """Set a batch going; nothing here waits for the device."""
        length = max(len(row.ids) for row in rows)
        ids_BT = torch.zeros((len(rows), length), dtype=torch.long)
        for b, row in enumerate(rows):
            ids_BT[b, : len(row.ids)] = torch.tensor(row.ids)
        looked_at = [range(b * length + row.first, b * length + len(row.ids)) for b, row in enumerate(rows)]
        places_P = torch.tensor([place for places in looked_at for place in places], device=self.device)
        # Padding stands behind, where the causal model does not look.
        hidden_BTd = self.model.model(ids_BT.to(self.device), use_cache=False).last_hidden_state
        hidden_Pd = hidden_BTd.flatten(0, 1)[places_P]
        requests: list[int] = []
        position: list[int] = []
        target: list[int] = []
        end = 0
        for row, places in zip(rows, looked_at, strict=True):
            end += len(places)
            for request, continuation in row.requests:
                requests.extend([request] * len(continuation))
                position.extend(range(end - len(continuation), end))
                target.extend(continuation)
        return _Asked(requests, *self._of_targets(hidden_Pd, torch.tensor(position), torch.tensor(target)))

    def _of_targets(self, hidden_Pd: Tensor, position: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Log-likelihood of each target at its position of P, and whether none is likelier; on the device."""
        log_likelihood = hidden_Pd.new_empty(len(target), dtype=torch.float32)
        likeliest = torch.empty(len(target), dtype=torch.bool, device=hidden_Pd.device)
        for start in range(0, len(hidden_Pd), _HEAD_POSITIONS):
            logits_PV = self.model.logits(hidden_Pd[start : start + _HEAD_POSITIONS]).float()
            # On the CPU: a mask on the device would have to be waited for.
            here = ((position >= start) & (position < start + len(logits_PV))).nonzero().squeeze(1)
            places, targets = (position[here] - start).to(self.device), target[here].to(self.device)
            here = here.to(self.device)
            log_likelihood[here] = logits_PV[places, targets] - logits_PV.logsumexp(dim=-1)[places]
            likeliest[here] = logits_PV.argmax(dim=-1)[places] == targets
        return log_likelihood, likeliest


def _read(asked: _Asked) -> Iterator[tuple[int, tuple[float, bool]]]:
    """Each request's index and answer, when the device has them."""
    sums: dict[int, float] = defaultdict(float)
    greedy: dict[int, bool] = defaultdict(lambda: True)
    figures = asked.log_likelihood.double().tolist(), asked.likeliest.tolist()
    for request, log_likelihood, is_likeliest in zip(asked.requests, *figures, strict=True):
        sums[request] += log_likelihood
        greedy[request] &= is_likeliest
    for request, total in sums.items():
        yield request, (total, greedy[request])


def one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each given only when the next one is there: the device is never without work."""
    iterator = iter(items)
    try:
        last = next(iterator)
    except StopIteration:
        return
    for item in iterator:
        yield last
        last = item
    yield last


def make_rows(requests: Sequence[Request], max_length: int) -> list[_Row]:
    """What the model has to read, the longest first; requests with equal inputs share a row.

    A context that does not fit is cut from the left, as lm-evaluation-harness does it.
    """
    shared: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
    for index, (_, context, continuation) in enumerate(requests):
        ids = (context + continuation)[-(max_length + 1) :][:-1]
        shared[tuple(ids)].append((index, continuation))
    rows = [
        _Row(ids, len(ids) - max(len(continuation) for _, continuation in wanted), wanted)
        for ids, wanted in shared.items()
    ]
    return sorted(rows, key=lambda row: (-len(row.ids), row.ids))


def refuse_no_numbers(values: Iterable[float]) -> None:
    """Raises UserError if one is NaN or infinite: a comparison with it would still name a best answer."""
    if not all(map(math.isfinite, values)):
        raise UserError(
            "the model gives likelihoods that are no numbers (NaN): its weights are damaged, or overflow --dtype"
        )


def batches(rows: Sequence[_Row], batch_tokens: int) -> Iterator[list[_Row]]:
    """Rows in order, as many as hold `batch_tokens` with their padding, at least one."""
    start = 0
    while start < len(rows):
        count = max(1, batch_tokens // len(rows[start].ids))
        yield list(rows[start : start + count])
        start += count
