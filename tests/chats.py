"""Chat templates in the manner of well-known ones, and small tokenizers that know their special tokens."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# As Qwen3: what the assistant thought before the last question is left out.
THINKING = """
{%- set last = namespace(question=-1) -%}
{%- for message in messages if message.role == 'user' -%}
    {%- set last.question = messages.index(message) -%}
{%- endfor -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' -}}
    {%- if message.role == 'assistant' and message.thinking and loop.index0 > last.question -%}
        {{- '<think>' + message.thinking + '</think>' -}}
    {%- endif -%}
    {{- message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
# As Llama 3: begins with bos, trims what is said.
TRIMMING = """
{{- bos_token -}}
{%- for message in messages -%}
    {{- '<|start|>' + message.role + '<|end|>\n\n' + message.content | trim + '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant<|end|>\n\n' -}}{%- endif -%}
"""
# As Vicuna: plain words between turns, and answers that end with eos.
PLAIN = """
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'user' -%}{{- 'USER: ' + message.content + ' ' -}}
    {%- elif message.role == 'assistant' -%}{{- 'ASSISTANT: ' + message.content + eos_token -}}
    {%- else -%}{{- raise_exception('no role ' + message.role) -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""
# With marks around the words alone.
MARKED = """
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content -}}{%- endgeneration -%}
    {%- else -%}{{- message.content -}}{%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
# The prompt is not what the answer follows: it opens a thought that the answer does not have.
UNSTABLE = """
{%- for message in messages -%}{{- message.role + ': ' + message.content + '<|eot|>' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant: <think>' -}}{%- endif -%}
"""
# The prompt ends with a space, which would be one token with the word after it.
SPACED = PLAIN.replace("{{- 'ASSISTANT:' -}}", "{{- 'ASSISTANT: ' -}}")
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>", "<|eot|>"]


def byte_tokenizer(
    *merges: tuple[str, str], template: str | None = None, begins: bool = False
) -> PreTrainedTokenizerBase:
    """Bytes and the given merges of them as tokens; `begins`: it puts <s> before texts by itself."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", extra_special_tokens=SPECIAL[2:]
    )
    made.chat_template = template
    return made


def talk(*said: str) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
