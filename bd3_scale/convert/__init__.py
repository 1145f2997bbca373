"""Checkpoints from and to other formats, tensor by tensor: one file per format, its names as a table.

`source.py` reads foreign files, `key_map.py` makes our tensors of theirs, `write.py` makes a checkpoint of them. `causal.py`
(GPT-2, Llama, Qwen), `published.py` (the paper's weights) and `bd3_export.py` (what `export.py` wrote) say what belongs where.
Invariants: never more than one tensor of each side in memory; no pickle is ever executed; a tensor that is not understood is
an error, never left out in silence; what cannot be represented is refused with the option's name.
"""
