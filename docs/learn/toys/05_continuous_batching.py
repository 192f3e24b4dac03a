"""Continuous batching: who is done leaves after any step, and who waits takes the place."""

from importlib import import_module

batching, paging = import_module("03_batching"), import_module("04_paging")
PLACES = 3  # sequences in a step, at most
REQUESTS = [([7, 3, 11], 9), ([20, 4], 2), ([1, 2], 3), ([5], 4), ([8, 8], 7), ([9], 2)]


def serve(is_continuous):
    pool, waiting, batch, steps, answers = paging.Pool(12), list(range(len(REQUESTS))), {}, [], {}
    while waiting or batch:
        if is_continuous or not batch:  # static: the next batch begins when this one has ended
            while waiting and len(batch) < PLACES:
                number = waiting.pop(0)
                prompt = REQUESTS[number][0]
                batch[number] = batching.Sequence(prompt, paging.PagedCache(pool))
        busy = [number for number in batch if number not in answers]
        batching.step([batch[number] for number in busy])
        steps.append(busy)
        for number in busy:
            prompt, wanted = REQUESTS[number]
            if len(batch[number].tokens) == len(prompt) + wanted:
                answers[number] = batch[number].tokens
                pool.free += batch[number].cache.table  # its blocks serve others from now on
                if is_continuous:
                    del batch[number]
        if all(number in answers for number in batch):
            batch = {}
    return answers, steps


if __name__ == "__main__":
    same = serve(False)[0] == serve(True)[0]
    for kind, steps in (("static", serve(False)[1]), ("continuous", serve(True)[1])):
        print(kind, len(steps), "steps,", sum(map(len, steps)), "of", 3 * len(steps), "places busy")
        for number in range(len(REQUESTS)):
            print("  request", number, "".join("#" if number in busy else "." for busy in steps))
    print("same answers:", same)
