"""The outside world of models: load a checkpoint, see it as blocks, observe a block's structure, save the result.

load     hub id, directory, GGUF file or `demo` -> model, tokenizer, fingerprint
adapter  a decoder as a sequence of blocks: calls, replay, weights as (out, in)
layout   what a block is made of, found out by running it
save     model + tokenizer -> a normal Hugging Face directory, all or nothing
"""
