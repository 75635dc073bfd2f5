"""One file an algorithm: what it needs of a batch, and one loss.

Beside `gamma` and `polyak` a critic says `trains_q` (if not, its Q is null), `needs_candidates` (of a batch), and what
its values converge to, `estimand` (`offline_lm.types.Estimand`); one whose estimand is the expectile has `tau`.
"""
