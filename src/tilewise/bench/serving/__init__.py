"""Attention as servers and trainers of unequal sequences call it: decoding, packed batches, chunks of a prompt, drafts.

    contest.py   who may be timed, and how many times faster        packed.py   sequences of unequal length
    decode.py    one query for each sequence of a cache             chunks.py   prompts in chunks, drafted tokens
    rivals.py    caches of ours and of others                       run.py      all of it, as one command
"""
