"""What the thresholds of the rule-based critic rest on: each eighth of the references, as the other seven see it.

    python bench/critic.py

prints how strange known, unknown and shuffled greetings are to the critic (ODD, BROKEN in common/characters.py),
how many read better from their end (BACKWARDS), and how often a greeting without a sign of its occasion is more like
another one's greetings (fit_occasions).
"""

import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common.characters import BACKWARDS, REFERENCES, CharacterModel
from common.lexicon import OCCASIONS, kindred, signs_of
from common.offline.flaws import fit_occasions
from common.records import Reference, read

PARTS = 8


def main() -> None:
    references = sorted(read(REFERENCES, Reference), key=lambda r: r.id)
    rng = random.Random(0)
    everything = CharacterModel([reference.response for reference in references])
    strangeness = {"known": [], "left out": [], "left out, all characters shuffled": []}
    gains = {"left out": [], "left out, one clause reversed": []}
    more_like_another = {"its own occasion asked for": [], "another occasion asked for": []}
    for part in range(PARTS):
        others = [reference for number, reference in enumerate(references) if number % PARTS != part]
        characters = CharacterModel([reference.response for reference in others])
        occasions = fit_occasions(others)
        for reference in references[part::PARTS]:
            text = reference.response
            strangeness["known"].append(everything.strangeness(text))
            strangeness["left out"].append(characters.strangeness(text))
            shuffled = "".join(rng.sample(text, len(text)))
            strangeness["left out, all characters shuffled"].append(characters.strangeness(shuffled))

            gains["left out"].append(characters.backwards(text))
            reversed_text = re.sub("[^，。！？；]{5,}", lambda clause: clause[0][::-1], text, count=1)
            if reversed_text != text:
                gains["left out, one clause reversed"].append(characters.backwards(reversed_text))

            most_like, stranger = occasions.predict([text])[0], rng.choice(references)
            for name, wanted in zip(more_like_another, (reference, stranger), strict=True):
                kin = kindred(wanted.occasion)
                fits = wanted is reference or reference.occasion not in kin
                if wanted.occasion in OCCASIONS and fits and not signs_of([wanted.occasion], text):
                    more_like_another[name].append(most_like not in kin)

    for name, nats in strangeness.items():
        nats.sort()
        low, middle, high = (round(nats[int(share * (len(nats) - 1))], 2) for share in (0.01, 0.5, 0.99))
        print(f"strangeness, {name}: 1% {low}, 50% {middle}, 99% {high}")
    for name, nats in gains.items():
        print(f"reads better backwards, {name}: {sum(gain > BACKWARDS for gain in nats) / len(nats):.1%}")
    for name, verdicts in more_like_another.items():
        share = sum(verdicts) / len(verdicts)
        print(f"no sign of the occasion and more like another, {name}: {share:.1%} of {len(verdicts)}")


if __name__ == "__main__":
    main()
