"""The security descriptor of a pipe on Windows, and the check that the system has applied it."""

from __future__ import annotations

import sys

if sys.platform == "win32":
    import contextlib
    import ctypes
    from ctypes import wintypes
    from typing import TYPE_CHECKING, Any

    from .errors import StartFailed

    if TYPE_CHECKING:
        from collections.abc import Iterator

    # winnt.h, sddl.h, accctrl.h
    _TOKEN_QUERY = 8
    _TOKEN_USER, _TOKEN_ELEVATION = 1, 20
    _SDDL_REVISION = 1
    _KERNEL_OBJECT = 6
    _OWNER, _ACCESS_LIST = 1, 4
    _ACCESS_ALLOWED = 0

    class _AccessList(ctypes.Structure):
        """ACL of winnt.h."""

        _fields_ = (
            ("revision", wintypes.BYTE),
            ("reserved", wintypes.BYTE),
            ("size", wintypes.WORD),
            ("count", wintypes.WORD),
            ("reserved2", wintypes.WORD),
        )

    class _AccessAllowed(ctypes.Structure):
        """ACCESS_ALLOWED_ACE of winnt.h; the SID begins at `sid`."""

        _fields_ = (
            ("type", wintypes.BYTE),
            ("flags", wintypes.BYTE),
            ("size", wintypes.WORD),
            ("mask", wintypes.DWORD),
            ("sid", wintypes.DWORD),
        )

    _kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    _advapi32 = ctypes.WinDLL("advapi32", use_last_error=True)
    _pointer = ctypes.c_void_p
    _out = ctypes.POINTER(ctypes.c_void_p)

    def _declare(function: Any, result: Any, *arguments: Any) -> Any:
        function.restype, function.argtypes = result, arguments
        return function

    _get_current_process = _declare(_kernel32.GetCurrentProcess, wintypes.HANDLE)
    _close_handle = _declare(_kernel32.CloseHandle, wintypes.BOOL, wintypes.HANDLE)
    _local_free = _declare(_kernel32.LocalFree, _pointer, _pointer)
    _open_process_token = _declare(
        _advapi32.OpenProcessToken, wintypes.BOOL, wintypes.HANDLE, wintypes.DWORD, ctypes.POINTER(wintypes.HANDLE)
    )
    _get_token_information = _declare(
        _advapi32.GetTokenInformation,
        *(wintypes.BOOL, wintypes.HANDLE, ctypes.c_int, _pointer, wintypes.DWORD, wintypes.LPDWORD),
    )
    _sid_to_string = _declare(_advapi32.ConvertSidToStringSidW, wintypes.BOOL, _pointer, ctypes.POINTER(wintypes.LPWSTR))
    _string_to_sid = _declare(_advapi32.ConvertStringSidToSidW, wintypes.BOOL, wintypes.LPCWSTR, _out)
    _string_to_descriptor = _declare(
        _advapi32.ConvertStringSecurityDescriptorToSecurityDescriptorW,
        *(wintypes.BOOL, wintypes.LPCWSTR, wintypes.DWORD, _out, wintypes.PULONG),
    )
    _get_security_info = _declare(
        _advapi32.GetSecurityInfo,
        *(wintypes.DWORD, wintypes.HANDLE, ctypes.c_int, wintypes.DWORD, _out, _out, _out, _out, _out),
    )
    _get_ace = _declare(_advapi32.GetAce, wintypes.BOOL, _pointer, wintypes.DWORD, _out)
    _equal_sid = _declare(_advapi32.EqualSid, wintypes.BOOL, _pointer, _pointer)

    def pipe_security_descriptor() -> bytes:
        """Return the security descriptor of a pipe that only this user can open, in self-relative form.

        It contains the user's SID instead of OWNER RIGHTS: the owner is chosen by the system, and for an elevated process it is
        the group of all administrators. The label keeps out processes of a lower integrity level: processes of the same user
        that are not elevated must not control an elevated daemon. See "Security Descriptor String Format",
        "Mandatory Integrity Control" and "Named Pipe Security and Access Rights" in the Win32 documentation.

        Raises `OSError`.
        """
        sid, elevated = _user()
        level = "HI" if elevated else "ME"
        text = f"O:{sid}G:{sid}D:P(A;;GA;;;{sid})S:(ML;;NWNRNX;;;{level})"
        descriptor, size = ctypes.c_void_p(), wintypes.ULONG()
        _check(_string_to_descriptor(text, _SDDL_REVISION, ctypes.byref(descriptor), ctypes.byref(size)))
        with _freed(descriptor):
            return ctypes.string_at(descriptor, size.value)

    def check_pipe_security(handle: int) -> None:
        """Raise `StartFailed` unless this user owns the pipe and is alone on its access control list; `OSError` if unknown."""
        owner, access_list, descriptor = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        wanted = _OWNER | _ACCESS_LIST
        found = [ctypes.byref(owner), None, ctypes.byref(access_list), None, ctypes.byref(descriptor)]
        if error := _get_security_info(handle, _KERNEL_OBJECT, wanted, *found):
            raise ctypes.WinError(error)
        user = ctypes.c_void_p()
        with _freed(descriptor):
            _check(_string_to_sid(_user()[0], ctypes.byref(user)))
            with _freed(user):
                if not owner or not _equal_sid(owner, user):
                    raise StartFailed("the pipe belongs to another user, who created it first: start again")
                if not _allows_only(access_list, user):
                    raise StartFailed("the pipe can be opened by others: the system has not applied its access control list")

    def _allows_only(access_list: ctypes.c_void_p, user: ctypes.c_void_p) -> bool:
        # Without a list, everybody has access.
        if not access_list or _AccessList.from_address(access_list.value or 0).count != 1:
            return False
        entry = ctypes.c_void_p()
        _check(_get_ace(access_list, 0, ctypes.byref(entry)))
        address = entry.value or 0
        allowed = _AccessAllowed.from_address(address).type == _ACCESS_ALLOWED
        return allowed and bool(_equal_sid(address + _AccessAllowed.sid.offset, user))

    def _user() -> tuple[str, bool]:
        """Return the SID of this process's user as text, and whether the process is elevated."""
        token = wintypes.HANDLE()
        _check(_open_process_token(_get_current_process(), _TOKEN_QUERY, ctypes.byref(token)))
        try:
            # TOKEN_USER begins with a pointer to the SID, which is in the same buffer.
            user = _token_information(token, _TOKEN_USER)
            text = wintypes.LPWSTR()
            _check(_sid_to_string(ctypes.c_void_p.from_buffer(user), ctypes.byref(text)))
            with _freed(text):
                sid = text.value or ""
            elevation = wintypes.DWORD.from_buffer(_token_information(token, _TOKEN_ELEVATION))
            return sid, bool(elevation.value)
        finally:
            _close_handle(token)

    def _token_information(token: wintypes.HANDLE, kind: int) -> ctypes.Array[ctypes.c_char]:
        needed = wintypes.DWORD()
        # The first call fails, and returns the size of the buffer.
        _get_token_information(token, kind, None, 0, ctypes.byref(needed))
        buffer = ctypes.create_string_buffer(needed.value)
        _check(_get_token_information(token, kind, buffer, needed, ctypes.byref(needed)))
        return buffer

    @contextlib.contextmanager
    def _freed(memory: ctypes.c_void_p | wintypes.LPWSTR) -> Iterator[None]:
        try:
            yield
        finally:
            _local_free(memory)

    def _check(succeeded: int) -> None:
        if not succeeded:
            raise ctypes.WinError(ctypes.get_last_error())
