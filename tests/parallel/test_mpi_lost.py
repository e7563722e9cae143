"""An MPI job that loses a rank ends, soon and not with status 0, and leaves no process behind."""

import os
import subprocess
import sys
import time
import unittest
import uuid

LAUNCH, PROGRAM = sys.argv[1].split(), sys.argv[2]
TIMEOUT = 2.0


def processes_with(marker):
    """Ids of processes that have `marker` in their environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if marker.encode() in file.read():
                    found.append(int(pid))
        except OSError:
            continue  # gone, or not ours
    return found


class LostRank(unittest.TestCase):
    def run_job(self, how):
        marker = f"job-{uuid.uuid4()}"
        environment = {**os.environ, "DITATTN_NUM_THREADS": "1", "DITATTN_TEST_MARKER": marker}
        start = time.monotonic()
        job = subprocess.run(
            [*LAUNCH, PROGRAM, how, str(TIMEOUT)], env=environment, capture_output=True, text=True, timeout=60
        )
        seconds = time.monotonic() - start
        deadline = time.monotonic() + 5  # the launcher's own children may still be on their way out
        while processes_with(marker) and time.monotonic() < deadline:
            time.sleep(0.05)
        self.assertEqual(processes_with(marker), [])
        print(f"{how}: status {job.returncode} after {seconds:.1f} s", file=sys.stderr)
        return job, seconds

    def test_without_a_loss_it_ends_well(self):
        job, _ = self.run_job("fine")
        self.assertEqual(job.returncode, 0, job.stderr)

    def test_killed(self):
        job, seconds = self.run_job("killed")
        self.assertNotEqual(job.returncode, 0)
        self.assertLess(seconds, TIMEOUT + 10)

    def test_asleep(self):
        job, seconds = self.run_job("asleep")
        self.assertNotEqual(job.returncode, 0)
        self.assertIn("rank 1 did not come within 2 s", job.stderr)
        self.assertLess(seconds, TIMEOUT + 10)

    def test_thrown_out(self):
        job, seconds = self.run_job("throws")
        self.assertNotEqual(job.returncode, 0)
        self.assertIn("thrown out", job.stderr)
        self.assertLess(seconds, TIMEOUT + 10)


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1])
