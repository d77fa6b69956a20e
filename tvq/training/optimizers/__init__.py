"""One module for each optimizer, of its name: `optimizer.name=lion` is lion.py.

    direction(config, model)    a transformation of gradients to what learning rate, schedule and weight decay
                                are applied to, which `tvq/training/optimizer.py` does
    describe(config, n_device)  if it is there, what the first lines of a run say of it

Moments keep the names of their parameters in the state, and so lie on the mesh as those do.
"""
