"""Compile a language model and continue a text: python examples/generate_text.py [MODEL] [PROMPT]

MODEL is a Hugging Face directory or a bundle; by default the model in ``examples/demo_model``.
"""

import sys
from pathlib import Path

import hal

DEMO = Path(__file__).parent / "demo_model"


def main() -> None:
    model = Path(sys.argv[1]) if len(sys.argv) > 1 else DEMO
    prompt = sys.argv[2] if len(sys.argv) > 2 else "The for statement"
    if model.suffix == ".hal":
        bundle = hal.load(model)
    else:
        bundle = hal.compile(model, target="host", output=model.name + ".hal")
    with bundle.session() as session:
        steps = session.generate(prompt, max_new_tokens=32)
        print(prompt, end="", flush=True)
        for piece in steps:
            print(piece, end="", flush=True)
    count = len(steps.token_ids)
    print(f"\n--- {count} tokens in {steps.seconds:.2f} s on {session.target}")


if __name__ == "__main__":
    main()
