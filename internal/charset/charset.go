// Package charset converts the text of a Postgres database to UTF-8, as Postgres does
// for a client, but tells which text does not convert instead of failing: Postgres can
// only end the statement, or the walsender.
package charset

import (
	"fmt"
	"unicode/utf8"
)

// Charset is the encoding of a database's text. The zero value is UTF8.
type Charset struct {
	Name string // as server_encoding has it; empty: UTF8
	// high are the characters of the bytes from 0x80 on; utf8.RuneError: none. Nil
	// where text is to be UTF-8 as it is, or where Postgres converts.
	high *[128]rune
}

// Of returns the encoding of that name, as server_encoding reports it.
func Of(name string) Charset { return Charset{name, singleByte[name]} }

// Raw reports whether Postgres is to send text as it is, for this package to convert. It is
// false for UTF8, which needs no conversion, and for encodings of several bytes, whose
// tables only Postgres has.
func (c Charset) Raw() bool { return c.high != nil || c.Name == "SQL_ASCII" }

// AppendUTF8 appends the text to dst. A byte that is no character is written as \x and
// two hex digits; defect says which is the first of them, and is empty if there is none.
func (c Charset) AppendUTF8(dst, text []byte) (converted []byte, defect string) {
	for at := 0; at < len(text); {
		r, size := c.decode(text[at:])
		if r == utf8.RuneError && size == 1 {
			if defect == "" {
				defect = c.defect(text[at], at)
			}
			dst = fmt.Appendf(dst, `\x%02x`, text[at])
		} else {
			dst = utf8.AppendRune(dst, r)
		}
		at += size
	}
	return dst, defect
}

func (c Charset) defect(b byte, at int) string {
	if c.high == nil {
		return fmt.Sprintf("the byte 0x%02x at %d, which is not UTF-8 (the database's encoding is %s)", b, at, c.Name)
	}
	return fmt.Sprintf("the byte 0x%02x at %d, which is no character of %s", b, at, c.Name)
}

// decode returns the first character and its bytes; utf8.RuneError and 1: it is none.
func (c Charset) decode(text []byte) (r rune, size int) {
	switch {
	case text[0] < utf8.RuneSelf:
		return rune(text[0]), 1
	case c.high != nil:
		return c.high[text[0]-utf8.RuneSelf], 1
	}
	return utf8.DecodeRune(text)
}

// ASCII reports whether the text is the same in every encoding.
func ASCII[T string | []byte](text T) bool {
	for i := range len(text) {
		if text[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// Text converts text that came as it is in the database where Raw says so, for people.
func (c Charset) Text(text string) string {
	if !c.Raw() || ASCII(text) {
		return text
	}
	converted, _ := c.AppendUTF8(nil, []byte(text))
	return string(converted)
}
