"""A byte-level BPE tokenizer of several scripts, with tokens that begin and end inside characters."""

from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "the answer is a word, der Größe nach; ответ простой, слово за словом. 答案很简单，一个词一个词。答案很好。"
    "こたえはかんたんです。カタカナ。 γειά σου κόσμε 😀😁😂 안녕하세요 मेरा नाम ```code``` 《书名》 “quote” 1234 "
)
CONTROLS = ("<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@cache
def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Made in this process; the control tokens and tags come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )  # fmt: skip
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in CONTROLS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
