"""What a model hub knows and answers, without sockets: path, query and token in, status, headers and body out.

It covers the part of the hub's protocol that downloads use: repository info, tree, paths-info, refs, auth-check, whoami, and `resolve`,
which sends small files itself and redirects those that match `lfs` to another host without tokens (the CDN). No Xet header is ever
sent, so that the client downloads over plain HTTP. Anonymous readers get 401 where others get 404 or 403, as there; the hub client
knows the cases apart by X-Error-Code and X-Error-Message alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, unquote

Kind = Literal["model", "dataset"]
LFS = ("*.zst", "*.safetensors", "*.parquet", "*.bin")


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class Repo:
    kind: Kind
    name: str
    lfs: Sequence[str]
    gated: bool = False
    token: str | None = None
    disabled: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def is_lfs(self, path: str) -> bool:
        return any(fnmatchcase(path, pattern) for pattern in self.lfs)

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        """The tree's line for a file. The oid of an LFS file is that of its pointer, as in git."""
        if not self.is_lfs(path):
            return {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
        lfs = {"oid": sha256(content), "size": len(content)}
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{lfs['oid']}\nsize {lfs['size']}\n".encode()
        lfs["pointerSize"] = len(pointer)
        return {"type": "file", "path": path, "size": len(content), "oid": git_sha1(pointer), "lfs": lfs}

    def tree(self, files: Mapping[str, bytes], recursive: bool) -> list[dict[str, Any]]:
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents if str(parent) != "."}
        lines = [{"type": "directory", "path": name, "size": 0, "oid": git_sha1(name.encode())} for name in sorted(folders)]
        lines += [self.entry(path, content) for path, content in files.items()]
        return [line for line in lines if recursive or "/" not in line["path"]]

    def info(self, commit: str, blobs: bool) -> dict[str, Any]:
        siblings = []
        for path, content in self.commits[commit].items():
            siblings.append({"rfilename": path})
            if blobs:
                line = self.entry(path, content)
                siblings[-1] |= {"size": line["size"], "blobId": line["oid"]}
                if "lfs" in line:
                    siblings[-1]["lfs"] = line["lfs"] | {"sha256": line["lfs"]["oid"]}
        fields = {"id": self.name, "sha": commit, "private": self.token is not None and not self.gated, "disabled": self.disabled}
        return fields | {"gated": "manual" if self.gated else False, "tags": [], "siblings": siblings}


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def error(status: int, code: str | None, message: str, **headers: str) -> Reply:
    head = {"X-Error-Message": message, "Content-Type": "application/json", **headers}
    return Reply(status, head | ({"X-Error-Code": code} if code else {}), json.dumps({"error": message}).encode())


def as_json(value: object) -> Reply:
    return Reply(200, {"Content-Type": "application/json"}, json.dumps(value).encode())


class Repositories:
    """All repositories and valid tokens of a hub. `cdn` is the address of the other host."""

    def __init__(self) -> None:
        self.cdn = ""
        self.repos: dict[tuple[Kind, str], Repo] = {}
        self.tokens: set[str] = set()

    def add(
        self,
        kind: Kind,
        name: str,
        files: Mapping[str, bytes],
        *,
        commit: str | None = None,
        branches: Sequence[str] = ("main",),
        gated: bool = False,
        private_token: str | None = None,
        lfs: Sequence[str] = LFS,
    ) -> str:
        """Add a commit, to which `branches` point from now on, and return its id. `private_token` opens a repository, which others
        see as gated or not at all."""
        repo = self.repos.setdefault((kind, name), Repo(kind, name, lfs, gated, private_token))
        self.tokens |= {private_token} - {None}
        commit = commit or hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()  # noqa: S324
        repo.commits[commit] = dict(files)
        repo.refs |= dict.fromkeys(branches, commit)
        return commit

    def remove(self, kind: Kind, name: str) -> None:
        del self.repos[kind, name]

    def gate(self, kind: Kind, name: str) -> None:
        self.repos[kind, name].gated = True

    def disable(self, kind: Kind, name: str) -> None:
        """Take it down as after a complaint: everything about it is refused."""
        self.repos[kind, name].disabled = True

    def answer(self, path: str, query: Mapping[str, list[str]], token: str | None) -> Reply:
        if path.startswith("/cdn/"):
            return self.stored(path.split("/")[2])
        if token is not None and token not in self.tokens:
            return error(401, None, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return as_json({"type": "user", "name": "reader"}) if token else error(401, None, "Invalid username or password.")
        for repo in list(self.repos.values()):
            for start in (f"/api/{repo.kind}s/{repo.name}", f"{'/datasets' if repo.kind == 'dataset' else ''}/{repo.name}"):
                if path == start or path.startswith(start + "/"):
                    return self.about(repo, start.startswith("/api/"), path[len(start) + 1 :], query, token)
        return error(404 if token else 401, "RepoNotFound", "Repository not found")

    def about(self, repo: Repo, api: bool, rest: str, query: Mapping[str, list[str]], token: str | None) -> Reply:
        """`rest` is VERB, VERB/REVISION or VERB/REVISION/PATH, still quoted."""
        verb, revision, path = (*map(unquote, rest.split("/", 2)), "", "")[:3]
        granted = repo.token is not None and token == repo.token
        if repo.disabled:
            return error(403, None, "Access to this resource is disabled.")
        if repo.token and not repo.gated and not granted:
            return error(404 if token else 401, "RepoNotFound", "Repository not found")
        if repo.gated and not granted and verb in ("resolve", "auth-check"):
            return error(403 if token else 401, "GatedRepo", f"Access to {repo.kind} {repo.name} is restricted.")
        if api and verb == "auth-check":
            return as_json({})
        if api and verb == "refs":
            lines = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in repo.refs.items()]
            return as_json({"branches": lines, "converts": [], "tags": []})
        commit = repo.refs.get(revision or "main", revision)
        if commit not in repo.commits:
            return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[commit]
        if not api:
            return self.resolve(repo, commit, path)
        if verb == "tree":
            return as_json(repo.tree(files, query.get("recursive") == ["true"]))
        if verb == "paths-info":
            return as_json([line for line in repo.tree(files, recursive=True) if line["path"] in query.get("paths", ())])
        return as_json(repo.info(commit, blobs="blobs" in query))

    def resolve(self, repo: Repo, commit: str, path: str) -> Reply:
        head = {"X-Repo-Commit": commit}
        content = repo.commits[commit].get(path)
        if content is None:
            return error(404, "EntryNotFound", "Entry not found", **head)
        if not repo.is_lfs(path):
            return Reply(200, head | {"ETag": f'"{git_sha1(content)}"', "Accept-Ranges": "bytes"}, content)
        location = f"{self.cdn}/cdn/{sha256(content)}/{quote(path)}"
        linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{sha256(content)}"', "Location": location}
        return Reply(302, head | linked, b"Found. Redirecting")

    def stored(self, digest: str) -> Reply:
        for files in [files for repo in self.repos.values() for files in repo.commits.values()]:
            for content in files.values():
                if sha256(content) == digest:
                    return Reply(200, {"ETag": f'"{digest}"', "Accept-Ranges": "bytes"}, content)
        return Reply(404, {})
