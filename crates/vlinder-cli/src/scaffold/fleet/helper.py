def answer(turn, call):
    """The reply to what another agent asks; a conversation and a state of its own."""
    return turn["input"][::-1]


