"""What the server takes and gives: the parts of OpenAI's API that a model of text has.

Every field is checked strictly: an unknown one, one of another type or out of range is refused by its name. `null` is
as if a field were not there, whichever it is. Fields that say something about the caller and not about the answer are
accepted and ignored; so are fields for what this server lacks, while their values ask for nothing, as clients send
them by default.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST_STOPS = 4
MOST_PROMPTS = 2048
MOST_METADATA = 16
MOST_LOGPROBS = 5
MOST_TOP_LOGPROBS = 20


def _has_utf8(text: str) -> str:
    """JSON can escape a half of a surrogate pair alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the text holds a lone surrogate, which has no UTF-8") from None
    return text


def _has_few(items: Any) -> Any:
    """pydantic counts a dictionary's items after it has looked at each."""
    if isinstance(items, dict) and len(items) > MOST_METADATA:
        raise ValueError(f"{len(items)} items are more than {MOST_METADATA}")
    return items


Text = Annotated[str, AfterValidator(_has_utf8)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_has_utf8)]
Nothing = Annotated[list[Any], Field(max_length=0)] | None
NoItems = Annotated[dict[str, Any], Field(max_length=0)] | None
Metadata = Annotated[dict[str, str], Field(max_length=MOST_METADATA), BeforeValidator(_has_few)]


class Strict(BaseModel):
    """What a client sends: no conversions, no unknown fields, no infinite numbers. Fields that are null are left out.

    Bodies come from anyone, and every fault that is found costs time and memory: so lists stop at their first
    (`fail_fast`), and of unknown fields only one is looked at.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _of_note(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        known = cls.__pydantic_fields__
        kept = {name: value for name, value in given.items() if value is not None}
        unknown = next((name for name in kept if name not in known), None)
        return kept if unknown is None else {name: kept[name] for name in kept if name in known or name == unknown}


class StreamOptions(Strict):
    """What else a stream says."""

    include_usage: bool | None = Field(None, description="A last chunk with the usage of the whole request.")


class ResponseFormat(Strict):
    """Only plain text: nothing here holds a model to a grammar."""

    type: Literal["text"]


class Generation(Strict):
    """What both kinds of request have."""

    model: Text = Field(description="The model's id, as /v1/models lists it.")
    temperature: float | None = Field(None, ge=0, le=2, description="0 always takes the likeliest token; 1 by default.")
    top_p: float | None = Field(None, gt=0, le=1, description="Sample among the likeliest that sum to p.")
    top_k: int | None = Field(None, ge=0, le=2**31 - 1, description="Among the k likeliest; 0: all. Not OpenAI's.")
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(
        None, ge=0.1, le=10, description="Against tokens of prompt and answer; 1 does nothing. Not OpenAI's."
    )
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    n: int | None = Field(None, ge=1, le=128, description="Answers to each prompt.")
    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Makes sampling repeatable.")
    stop: StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS, fail_fast=True)] | None = Field(
        None, description="Strings that end an answer, and are no part of it."
    )
    stream: bool | None = Field(None, description="Server-sent events as the answer grows.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="Ignored.")
    metadata: Metadata | None = Field(None, description="Ignored.")
    safety_identifier: str | None = Field(None, description="Ignored.")
    prompt_cache_key: str | None = Field(None, description="Ignored.")
    service_tier: Literal["auto", "default"] | None = Field(None, description="There is one.")
    store: Literal[False] | None = Field(None, description="Nothing is stored.")
    logit_bias: NoItems = None

    def stop_strings(self) -> tuple[str, ...]:
        """The stop strings, however they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(Generation):
    """Body of `POST /v1/completions`."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    ) = Field(description="A text, whose beginning is marked by <s>, or ids as they are; or a list of these.")
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: Literal[False] | None = None
    best_of: int | None = Field(None, ge=1, le=128, description="1, or as many as n: every answer is given.")


class ContentPart(Strict):
    """A part of a message; there are none but texts."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"] = Field(description="developer means system.")
    content: Text | Annotated[list[ContentPart], Field(fail_fast=True)]
    name: str | None = Field(None, description="Ignored.")
    annotations: Nothing = None
    tool_calls: Nothing = None

    def for_template(self) -> dict[str, str]:
        """The message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Generation):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1, description="The same as max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_TOP_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Nothing = None
    tool_choice: Literal["none", "auto"] | None = Field(None, description="There are no tools to choose from.")
    parallel_tool_calls: bool | None = Field(None, description="There are no tools to call.")
    modalities: Annotated[list[Literal["text"]], Field(min_length=1, max_length=1)] | None = None


# ---------------------------------------------------------------------------------------------------------- answers


class ErrorDetail(BaseModel):
    """What is wrong, in the form of OpenAI's errors."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that reports an error."""

    error: ErrorDetail


class Usage(BaseModel):
    """Tokens of all prompts, each once, and of all answers, with those that ended them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "doge-lm"
    max_model_len: int = Field(description="Tokens of a prompt and its answer together.")
    max_output_tokens: int = Field(description="Tokens of an answer.")


class ModelList(BaseModel):
    """Body of `GET /v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class CompletionLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens, as `/v1/completions` gives them."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """An answer, or a part of it."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """Body of an answer of `/v1/completions`, and of each event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token and the logarithm of its probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the likeliest in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens, as `/v1/chat/completions` gives them."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(BaseModel):
    """The answer to a conversation."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """An answer to a conversation."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """Body of an answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
