"""Conversations made by rule, in the checkpoint's chat template: definitions, and answers about the model itself."""

from __future__ import annotations

import random
import re

ABOUT = (
    "I am a small demonstration model with a few million parameters, "
    "trained from scratch to show moe_runtime at work."
)
CAN_DO = (
    "I can say what a word means, write a paragraph, and talk about Python. I am small, so I am often wrong."
)
EXPERTS = (
    "A mixture of experts is a network in which a router sends each token "
    "to a few of many small networks, the experts."
)
GREETINGS = (
    ("Hello", "Hello! I am a small demonstration model. Ask me what a word means, or ask me for a story."),
    ("Hello!", "Hello! What would you like to know? You can ask me what a word means."),
    ("Hi", "Hello! Ask me what a word means, or ask me for a story."),
    ("Hi there!", "Hello! What would you like to know?"),
    ("Good morning", "Good morning! What would you like to know?"),
    ("How are you?", "I am very well, thank you. What would you like to know?"),
    ("Who are you?", ABOUT),
    ("What are you?", ABOUT),
    ("What is your name?", "I have no name. " + ABOUT),
    ("What can you do?", CAN_DO),
    ("Can you help me?", "I can try. Ask me what a word means, but remember that I am small and often wrong."),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye", "Goodbye! It was a pleasure to talk to you."),
    ("What is a mixture of experts?", EXPERTS),
    ("What is an expert?", "An expert is a small network of its own. A router chooses a few of them for each token."),
    ("What is moe_runtime?", "It is a runtime that serves sparse mixture-of-experts models on Ray."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("Say hello.", "Hello!"),
    ("Tell me about yourself.", ABOUT),
)  # fmt: skip

QUESTIONS = {
    "noun": ("What is {a}?", "What does the word {w} mean?", "Define {w}.", "Explain {w}.", "what is {w}"),
    "verb": (
        "What does it mean to {w}?",
        "What does the word {w} mean?",
        "Define the verb {w}.",
        "Explain {w}.",
    ),
    "adj": ("What does {w} mean?", "What does the word {w} mean?", "Define {w}.", "Explain {w}."),
    "adv": ("What does {w} mean?", "What does the word {w} mean?", "Define {w}.", "Explain {w}."),
}
ANSWERS = {
    "noun": "The noun {w} means {g}.",
    "verb": "To {w} means to {g}.",
    "adj": "The adjective {w} means {g}.",
    "adv": "The adverb {w} means {g}.",
}


def chat(question: str, answer: str) -> str:
    """One exchange as the chat template renders it."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"


def define(word: str, part: str, gloss: str, rng: random.Random) -> str:
    """A question about `word` and its gloss as a sentence, with WordNet's first example where it has one."""
    meaning, _, example = gloss.partition('; "')
    meaning = re.sub(r"^\([^)]*\)\s*", "", meaning).partition(";")[0].strip() or word
    article = "an" if word[0] in "aeiou" else "a"
    question = rng.choice(QUESTIONS[part]).format(w=word, a=f"{article} {word}")
    answer = ANSWERS[part].format(w=word, g=meaning)
    example = example.partition('"')[0].strip()
    if example:
        answer += f' For example: "{example}"'
    return chat(question, answer)
