"""The Inductor lowering rules for the operators of ``gdn_ops``.

    import gdn_ops            # is enough: the first compile that traces an operator registers them
    lowering.register()       # or explicitly; idempotent
    lowering.unregister()     # operators are opaque calls again

``TORCH_LOGS="+lowering"`` tells which configuration was chosen, what was fused into it, and what
fell back, and why.
"""


def register() -> None:
    """Let Inductor turn every operator into its template, from the next compile on."""
    from . import rules

    rules.register()


def unregister() -> None:
    """Leave every operator to its eager implementation, from the next compile on."""
    from . import rules

    rules.unregister()
