package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// Token is one token of a subject: exactly one of the two is set.
type Token struct {
	Literal string
	Column  string
}

// Subject is the template of a message's subject. Its first token is literal.
type Subject struct {
	Tokens []Token
}

// ParseSubject reads a template such as events.{aggregate_type}.{event_type}.
func ParseSubject(s string) (Subject, error) {
	var subject Subject
	for i, part := range strings.Split(s, ".") {
		token, err := parseToken(part)
		if err != nil {
			return Subject{}, fmt.Errorf("is %q, whose token %d %w", s, i+1, err)
		}
		if token.Column != "" && slices.Contains(subject.Columns(), token.Column) {
			return Subject{}, fmt.Errorf("is %q, whose token %d is a column that it has already", s, i+1)
		}
		subject.Tokens = append(subject.Tokens, token)
	}
	if subject.Tokens[0].Literal == "" {
		return Subject{}, fmt.Errorf("is %q, whose first token is a column: begin with a literal one, such as events", s)
	}
	return subject, nil
}

func parseToken(s string) (Token, error) {
	if s == "" {
		return Token{}, errors.New("is empty: remove the extra dot")
	}
	if inner, ok := strings.CutPrefix(s, "{"); ok {
		column, closed := strings.CutSuffix(inner, "}")
		if !closed || !isColumn(column) {
			return Token{}, errors.New("is not {column} of a name in ASCII: give each column a token of its own")
		}
		if strings.EqualFold(column, "position") {
			return Token{}, errors.New("is {position}, whose long values would stand in the header Outbox-Position: use another column")
		}
		return Token{Column: column}, nil
	}
	if strings.ContainsAny(s, "*>") {
		return Token{}, errors.New("is a wildcard: events are published on plain subjects")
	}
	if strings.ContainsFunc(s, func(r rune) bool { return !isTokenRune(r) }) {
		return Token{}, errors.New("is neither {column} nor made of A-Z a-z 0-9 _ - only")
	}
	return Token{Literal: s}, nil
}

func isTokenRune(r rune) bool {
	return 'A' <= r && r <= 'Z' || 'a' <= r && r <= 'z' || '0' <= r && r <= '9' || r == '_' || r == '-'
}

// isColumn reports whether s names a column and can stand in the name of a
// header (Outbox-<Column>).
func isColumn(s string) bool {
	return s != "" && len(s) <= maxIdentifier && !strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || r > '~' || strings.ContainsRune("{}:", r)
	})
}

// String is the template as it was given.
func (s Subject) String() string {
	return s.join(func(column string) string { return "{" + column + "}" })
}

// Wildcard is the subject a stream needs: each column as *.
func (s Subject) Wildcard() string { return s.join(func(string) string { return "*" }) }

// Columns are the columns, in order.
func (s Subject) Columns() []string {
	var columns []string
	for _, t := range s.Tokens {
		if t.Column != "" {
			columns = append(columns, t.Column)
		}
	}
	return columns
}

func (s Subject) join(column func(string) string) string {
	parts := make([]string, len(s.Tokens))
	for i, t := range s.Tokens {
		parts[i] = t.Literal
		if t.Column != "" {
			parts[i] = column(t.Column)
		}
	}
	return strings.Join(parts, ".")
}
