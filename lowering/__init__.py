"""The Inductor lowering rules for the operators of ``gdn_ops``.

No rule is registered yet: under ``torch.compile`` an operator runs as one opaque call of its eager
implementation, in one graph with its neighbours and not fused with them.
"""
