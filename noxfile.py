"""All checks of the project: `nox` runs them, `nox -s tests-3.13 -- -k proxy` a part of them."""

import hashlib
import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "uv"
nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"
nox.options.stop_on_first_error = False

PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)
# Of the interpreters that the machine has the oldest and the newest; `nox -s tests` takes them all, and so do the workflows.
FOUND = [version for version in PYTHONS if shutil.which(f"python{version}")] or PYTHONS
ENDS = [f"tests-{version}" for version in dict.fromkeys((FOUND[0], FOUND[-1]))]
nox.options.sessions = ["lint", "types", *ENDS, "lowest", "chaos"]
# Each worker has servers of its own, but the cluster: its tests are all one worker's. Half of the time is waiting.
PARALLEL = ("--numprocesses", "5", "--dist", "loadgroup", "--quiet")
# The whole matrix of stores and servers, the schedules and the coverage (every line and branch of the package) are the
# first interpreter's; the others run one store of each sort.
FEW_KINDS = "memory,valkey,cluster,fake,fake-without-lua,client"
EXTRAS = ",".join(PYPROJECT["project"]["optional-dependencies"])
# Inside nox's own directory: nothing of a run is left in the tree.
SCRATCH = Path(".nox/.scratch").resolve()
COVERAGE = SCRATCH / "coverage"
_wheels: list[Path] = []


def group(name: str) -> tuple[str, ...]:
    """Return the requirements of a dependency group."""
    return nox.project.dependency_groups(PYPROJECT, name)


def built(session: nox.Session) -> Path:
    """Build the sdist and, from it, the wheel, once for all sessions of a run, and return the wheel."""
    # Nox runs all sessions in one process.
    if not _wheels:
        dist = SCRATCH / "dist"
        shutil.rmtree(dist, ignore_errors=True)
        session.run("uv", "build", "--quiet", "--out-dir", str(dist))
        _wheels.extend(dist.glob("*.whl"))
    return _wheels[0]


def install_wheel(session: nox.Session, *more: str) -> None:
    """Install the built wheel with all extras, and the test group."""
    wheel = f"{PYPROJECT['project']['name']}[{EXTRAS}] @ {built(session).as_uri()}"
    session.install(wheel, *group("test"), *more)


def run_tests(session: nox.Session, *, whole: bool) -> None:
    """Run the suite against the installed wheel: the whole of it, and its coverage, or what may differ elsewhere."""
    # Without it the working directory comes first on the path, and with it the source tree.
    env = {"PYTHONSAFEPATH": "1", "ASYNCIDEM_TEST_INSTALLED": "1"}
    if not whole:
        env["ASYNCIDEM_TEST_KINDS"] = FEW_KINDS
        session.run(
            "python", "-m", "pytest", *PARALLEL, "--ignore=tests/schedules", "-m", "not once", *session.posargs, env=env
        )
        return
    COVERAGE.mkdir(parents=True, exist_ok=True)
    env["COVERAGE_FILE"] = str(COVERAGE / ".coverage")
    session.run("python", "-m", "coverage", "erase", env=env)
    session.run("python", "-m", "coverage", "run", "-m", "pytest", *PARALLEL, *session.posargs, env=env)
    session.run("python", "-m", "coverage", "combine", "--quiet", env=env)
    if not session.posargs:  # a part of the suite covers a part
        session.run("python", "-m", "coverage", "report", env=env)


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format and the direction of imports."""
    session.install(*group("lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-cache")
    session.run("zizmor", "--offline", "--quiet", "--persona", "pedantic", ".github/workflows")


@nox.session
def types(session: nox.Session) -> None:
    """Types of the package, and of a typing file that is checked and never run."""
    project = PYPROJECT["project"]
    extras = [requirement for extra in project["optional-dependencies"].values() for requirement in extra]
    session.install(*project["dependencies"], *extras, *group("types"))
    session.run("mypy")
    session.run("pyright")


@nox.session
def build(session: nox.Session) -> None:
    """Sdist and wheel, in a directory of nox's own, the same bytes each time; `-- v1.2.3` is the tag of a release."""
    tag, version = next(iter(session.posargs), None), PYPROJECT["project"]["version"]
    if tag not in (None, f"v{version}"):
        session.error(f"the tag {tag} is not of the version {version} in pyproject.toml")
    first = digests(built(session).parent)
    _wheels.clear()
    if first != digests(built(session).parent):
        session.error("two builds of one tree differ")
    for name, digest in first.items():
        session.log(f"{digest}  {name}")


def digests(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that a build made."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.glob("asyncidem-*"))}


@nox.session
def audit(session: nox.Session) -> None:
    """Look for known vulnerabilities in what the package and its extras bring; it asks PyPI."""
    wheel = f"{PYPROJECT['project']['name']}[{EXTRAS}] @ {built(session).as_uri()}"
    session.install(wheel, *group("audit"))
    session.run("pip-audit", "--skip-editable", "--local")


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the suite on every interpreter found, and on the first one against every kind of store and server."""
    install_wheel(session)
    run_tests(session, whole=session.python == PYTHONS[0])


@nox.session(python=PYTHONS[0])
def lowest(session: nox.Session) -> None:
    """Run the suite with the lowest versions that the project says it supports."""
    constraints = SCRATCH / "lowest.txt"
    constraints.parent.mkdir(parents=True, exist_ok=True)
    options = ("--quiet", "--no-header", "--no-annotate", "--all-extras", "--resolution", "lowest-direct")
    session.run("uv", "pip", "compile", "pyproject.toml", *options, "--output-file", str(constraints), silent=True)
    install_wheel(session, "--constraint", str(constraints))
    run_tests(session, whole=False)


@nox.session
def chaos(session: nox.Session) -> None:
    """Break processes, networks and servers for a minute; `nox -s chaos -- --minutes 30` does so for longer."""
    install_wheel(session)
    env = {"PYTHONSAFEPATH": "1", "ASYNCIDEM_TEST_INSTALLED": "1"}
    session.run("python", "-m", "pytest", "tests/chaos", *session.posargs, env=env)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure beside bare commands and the peers: `nox -s bench`, or `nox -s bench -- --quick` in under a minute."""
    project = PYPROJECT["project"]["name"]
    session.install(f"{project} @ {built(session).as_uri()}", *group("bench"))
    session.run("python", "tests/benchmarks/bench.py", *session.posargs, env={"PYTHONSAFEPATH": "1"})


@nox.session
def schedules(session: nox.Session) -> None:
    """Explore schedules beyond what the tests do: `nox -s schedules -- --minutes 30`."""
    install_wheel(session)
    session.run("python", "tests/schedules/explore.py", *session.posargs, env={"PYTHONSAFEPATH": "1"})
