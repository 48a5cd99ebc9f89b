"""Models over a paged KV cache. Import from the submodules: most of them need nothing of `transformers`.

Start with `interface` (what an engine needs of a model) and `paged_kv`; `load_model` turns a specification (`spec`)
into a model, `tokenizer` into its tokenizer; `toy` and `timed` are models without weights.
"""
