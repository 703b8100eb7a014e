FROM python:3.13.9-slim-trixie

ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    TMPDIR=/data \
    VINCACHE_DATABASE=/data/vincache.db

# The service's user owns nothing but the volume; the rest of the file system may be mounted read-only. Its group may
# write there too: some platforms give each container a user of their own choice, in group 0.
RUN install --directory --owner=10001 --group=0 --mode=0775 /data
VOLUME /data

# A layer of its own: it changes with the pins only.
WORKDIR /app
COPY requirements.txt .
RUN sed '/^# Only the tests/,$d' requirements.txt > service.txt \
    && pip install --quiet --no-cache-dir --root-user-action=ignore --disable-pip-version-check --compile -r service.txt \
    && rm service.txt \
    # Packages' own tests: 60 MB that nobody runs here.
    && find "$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" -type d -name tests -prune -exec rm -r {} +

COPY main.py schema.sql ./
RUN python -m py_compile main.py

# By number, so that a platform can see that it is not root.
USER 10001:0
EXPOSE 8000
# Not by urllib, which would ask HTTP_PROXY for it.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s \
    CMD ["python", "-c", "from http.client import *; c = HTTPConnection('127.0.0.1', 8000, timeout=2); c.request('GET', '/healthz'); exit(c.getresponse().status != 200)"]

# One process per file (README, Operating). In exec form it gets Docker's SIGTERM itself, and is done within Docker's 10 s.
CMD ["uvicorn", "main:app", "--host", "0.0.0.0", "--port", "8000", "--timeout-graceful-shutdown", "8"]
