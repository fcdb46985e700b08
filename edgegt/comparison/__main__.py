"""One job of a comparison, in this process: `python -m edgegt.comparison FOLDER`, with the job as JSON on its input."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from edgegt.comparison.jobs import Job
from edgegt.disk import write_json
from edgegt.errors import EdgegtError
from edgegt.process import share_the_machine


def main() -> int:
    """Do the job and write what came of it to FOLDER/<name>.json. Returns the exit code."""
    share_the_machine()
    from edgegt.comparison.work import work

    folder, job = Path(sys.argv[1]), Job.from_json(json.load(sys.stdin))
    try:
        write_json(folder / f"{job.name}.json", {"job": job.to_json(), "result": work(job, folder / job.name)})
    except EdgegtError as error:
        sys.stderr.write(f"edgegt: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
