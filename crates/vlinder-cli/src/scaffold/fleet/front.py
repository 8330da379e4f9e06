def answer(turn, call):
    """The reply to one turn: asks the helper for each word, all at the same time.

    call("runtime/delegate", {"target": "…", "input": "…"}) gives work to another agent and a handle;
    call("runtime/wait", {"handle": "…"}) waits for its reply. One that fails raises here, and only here.
    """
    words = turn["input"].split()[:16]
    handles = [json.loads(call("runtime/delegate", {"target": "helper", "input": word}))["handle"] for word in words]
    return " ".join(call("runtime/wait", {"handle": handle}) for handle in handles)


