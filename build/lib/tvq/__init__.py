"""tvq: training of Transformer-VQ, a transformer whose dense attention costs linear time."""
