# The driver's image. `make image` builds it with docker, podman or buildah, whichever is there; a plain `docker build .` does, too.
#
# The base is Debian bookworm; a release pins it by digest (BASE_IMAGE=debian:bookworm-slim@sha256:..., see .github/workflows/).
# Python packages are pinned by hash in requirements/. Where no package index is reached, bring the wheels along in ./wheels
# (`make wheels` fetches them): then no index is asked.
ARG BASE_IMAGE=debian:bookworm-slim

# --- build: the virtual environment -----------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE} AS build
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ca-certificates python3 python3-venv
WORKDIR /src
# wheels/ may be missing: the pattern then matches nothing, and COPY is content with the requirements.
COPY requirements/runtime.txt requirements/build.txt wheels* /src/requirements/
RUN python3 -m venv /opt/tatami && python3 -m venv /opt/build \
 && if ls requirements/*.whl >/dev/null 2>&1; then printf '[global]\nno-index = true\nfind-links = /src/requirements\n' > /etc/pip.conf; fi \
 && /opt/tatami/bin/pip install --disable-pip-version-check --no-cache-dir --require-hashes -r requirements/runtime.txt \
 && /opt/build/bin/pip install --disable-pip-version-check --no-cache-dir --require-hashes -r requirements/build.txt
COPY pyproject.toml README.md LICENSE /src/
COPY csi_driver /src/csi_driver
# pip itself stays behind, and what is compiled now need not be written to a read-only root later.
RUN /opt/build/bin/pip wheel --disable-pip-version-check --no-cache-dir --no-deps --no-index --no-build-isolation -w /tmp/wheel . \
 && /opt/tatami/bin/pip install --disable-pip-version-check --no-cache-dir --no-deps --no-index /tmp/wheel/*.whl \
 && /opt/tatami/bin/pip uninstall --yes --quiet pip setuptools \
 && find /opt/tatami -name '*.pyc' -delete \
 && /opt/tatami/bin/python -m compileall -q /opt/tatami/lib

# --- the image --------------------------------------------------------------------------------------------------------------------
FROM ${BASE_IMAGE}
# nfs-common: mount.nfs. mount, util-linux: mount(8), losetup, blkid. The rest makes, checks and grows file systems.
# libxml2 and libicu72 (38 MB) serve nfsref and xfs_scrub only, which nothing here calls.
RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      python3 mount util-linux nfs-common e2fsprogs xfsprogs btrfs-progs \
 && dpkg --remove --force-depends libxml2 libicu72 \
 && rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* /usr/share/doc/* /usr/share/man/* /usr/share/locale/* \
 && groupadd --system --gid 65532 tatami \
 && useradd --system --uid 65532 --gid 65532 --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin tatami
# After the packages: a new revision alone installs nothing anew.
ARG VERSION=unknown
ARG REVISION=unknown
ARG SOURCE=
LABEL org.opencontainers.image.title="Tatami" \
      org.opencontainers.image.description="CSI driver: Kubernetes volumes out of directories of nodes and of NFS servers" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.source="${SOURCE}"
COPY --from=build /opt/tatami /opt/tatami
ENV PATH=/opt/tatami/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1
# Whoever mounts needs root: the node service, and the controller of NFS pools, which mounts each share. Their manifests say so
# (runAsUser: 0). Everything else runs as this user: `--role expansion`, `tatami call --help`, `tatami --version`.
USER 65532:65532
ENTRYPOINT ["tatami"]
CMD ["--help"]
