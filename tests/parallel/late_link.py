"""A link between device and host memory whose copies come as late as they may, for tests without a GPU."""


class LateLink:
    """Copies when their event is waited for, in order; until then the target is NaN.

    log: what happened, in order: `start n`, `end n`.
    """

    def __init__(self):
        self.waiting, self.log, self.started = [], [], 0

    def copy(self, target, source):
        number, self.started = self.started, self.started + 1
        self.log.append(f"start {number}")
        target.fill_(float("nan"))
        self.waiting.append((number, target, source))
        return LateEvent(self, number)

    def run(self, last):
        while self.waiting and self.waiting[0][0] <= last:
            number, target, source = self.waiting.pop(0)
            target.copy_(source)
            self.log.append(f"end {number}")


class LateEvent:
    def __init__(self, link, number):
        self.link, self.number = link, number

    def synchronize(self):
        self.link.run(self.number)

    def wait(self):
        self.link.run(self.number)
