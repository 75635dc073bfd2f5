"""Losses: pure functions of tensors.

Steps of many episodes lie end to end in one flat axis ``n``; episode ``e`` is the half-open range
``offsets[e]:offsets[e + 1]``. Ensembles stand in front: ``[k, n]``. Masks are boolean, True where a step
counts. Whatever a mask hides may be NaN: it reaches neither the loss nor a gradient.
"""
