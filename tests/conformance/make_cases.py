"""Writes cases/pairwise.txt: cases in which every two values of the fields of cases/space.txt meet, in three rounds.

    python make_cases.py            # writes the file
    python make_cases.py --check    # exits 1 if the committed file is not what this script writes

Greedy, seeded: each new case starts from a pair that has not met yet and gives every other field the value that adds
the most new pairs. Large problems are avoided where values tie, so that the suite stays quick.
"""

import argparse
import itertools
import pathlib
import random
import sys

CASES = pathlib.Path(__file__).parent / "cases"
MAX_CASES = 600
ROUNDS = 3  # each pair meets in three independent surroundings
SEED = 20240607


def read_space(path):
    fields = {}
    for line in path.read_text().splitlines():
        words = line.split("#")[0].split()
        if words:
            fields[words[0].rstrip("*")] = words[1:]
    return fields


def pairs_of(case, names):
    return {((a, case[a]), (b, case[b])) for a, b in itertools.combinations(names, 2) if a in case and b in case}


def make_cases(fields, seed):
    rng = random.Random(seed)
    names = list(fields)
    missing = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in fields[a] for y in fields[b]
    }
    cases = []
    while missing:
        (a, x), (b, y) = rng.choice(sorted(missing))
        case = {a: x, b: y}
        for name in rng.sample(names, len(names)):
            if name not in case:
                case[name] = best_value(case, name, fields, names, missing, rng)
        missing -= pairs_of(case, names)
        cases.append(case)
    return [" ".join(f"{name}={case[name]}" for name in names) for case in cases]


def best_value(case, name, fields, names, missing, rng):
    def new_pairs(value):
        added = 0
        for other in case:
            first, second = sorted((name, other), key=names.index)
            trial = {name: value, **case}
            added += ((first, trial[first]), (second, trial[second])) in missing
        return added

    gains = {value: new_pairs(value) for value in fields[name]}
    best = max(gains.values())
    ties = [value for value in fields[name] if gains[value] == best]
    return ties[0] if best == 0 and name in ("D", "Sq", "Skv", "B") else rng.choice(ties)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    fields = read_space(CASES / "space.txt")
    lines = [line for round_number in range(ROUNDS) for line in make_cases(fields, SEED + round_number)]
    if len(lines) > MAX_CASES:
        sys.exit(f"{len(lines)} cases, more than {MAX_CASES}")
    text = "# Written by make_cases.py from space.txt: every two values meet.\n" + "\n".join(lines) + "\n"
    path = CASES / "pairwise.txt"
    if arguments.check:
        if path.read_text() != text:
            sys.exit(f"{path} is not what make_cases.py writes: run it again")
        return
    path.write_text(text)
    print(f"{path}: {len(lines)} cases")


if __name__ == "__main__":
    main()
