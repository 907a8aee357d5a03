"""One layer: its parts, its mixers, the masks they see, and several layers in one call.

Shape suffixes: B batch, L length, D hidden size, I Mamba width (H*P), C convolution channels, H Mamba heads, P head
dim, G groups, N state size, K convolution kernel, W = K-1, T tokens (B*L), E experts, k experts per token, A attention
heads, Q head dim of attention, V vocabulary.
"""
