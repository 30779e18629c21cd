"""The prefix tree, its layout in one packed row, log-probabilities of tree positions and the economy of sharing.

Shape suffixes used across the package, read letter by letter (`q_HTD` is `(heads, tokens, head_dim)`):

| | | | | | |
|---|---|---|---|---|---|
| `B` | prefixes | `P` | prefix length | `H` | query heads |
| `G` | suffixes per prefix | `S` | scored tokens of all sequences | `K` | key/value heads |
| `N` | sequences | `T` | packed tokens | `D` | head size |
| `E` | distinct scored tokens | `M` | predicting positions | `V` | vocabulary |
"""
