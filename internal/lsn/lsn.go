// Package lsn reads an LSN from Postgres's text.
package lsn

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/jackc/pglogrepl"
)

// Parse reads an LSN as Postgres prints it, "<32 bits>/<32 bits>" in hex: the
// whole text or nothing. pglogrepl.ParseLSN stops at what is no digit, and lets
// a half that is too large run over into the other.
func Parse(text string) (pglogrepl.LSN, error) {
	upper, lower, _ := strings.Cut(text, "/")
	high, err1 := strconv.ParseUint(upper, 16, 32)
	low, err2 := strconv.ParseUint(lower, 16, 32)
	if err := errors.Join(err1, err2); err != nil {
		return 0, fmt.Errorf("parse LSN %q: %w", text, err)
	}
	return pglogrepl.LSN(high<<32 | low), nil
}
