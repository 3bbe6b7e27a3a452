"""The conversations that every route is asked about."""

QUESTION = "What is the capital of France?"
ANSWERS = ["The capital of France is Paris.", "I am sorry, I cannot help with that.", "Good."]
TALKS = [
    [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": answer}]
    for answer in ANSWERS
]
