"""Where a run gets a process of its own, which must be able to take what it is given."""

import pickle


def run_in_isolation(target, args=(), kwargs=None, error_context=""):
    """Calls what another process would be sent, sent and received."""
    target, args, kwargs = pickle.loads(pickle.dumps((target, args, kwargs or {})))
    return target(*args, **kwargs)
