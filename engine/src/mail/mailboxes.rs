//! The mailboxes of a field like From (RFC 5322 §3.4, and §4.4's obsolete forms), for the question whose they are.
//!
//! Who reads the message may read a malformed field otherwise than we do. So what two readers could take for different
//! addresses is no address here, and makes the field unreadable. Libraries are made for readers: mail-parser takes
//! `<b@evil.example> <a@good.example>` for the one at good.example, Python's for the other.

/// What a field names.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Mailboxes {
    /// Each that has an address: its domain as written, if it can only be read in one way.
    pub domains: Vec<Option<String>>,
    /// There is none, one has no address or more than one, or something stands where nothing should.
    pub unreadable: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token<'a> {
    /// An atom with its dots, an encoded word, or a word that is no token at all.
    Word(&'a str),
    Quoted,
    /// A domain literal, brackets included.
    Literal(&'a str),
    /// One of `<>@,:;`.
    Special(char),
}

/// Reads a field's value.
pub fn read(value: &str) -> Mailboxes {
    let mut read = Mailboxes::default();
    let Some(tokens) = tokens(value) else { return Mailboxes { unreadable: true, ..read } };
    let mut bracketed = false;
    let mut mailbox = Vec::new();
    let mut is_named = false;
    for token in tokens {
        match token {
            Token::Special(',' | ';') if !bracketed => {
                // A group may be empty, and so may what stands between two commas (§4.4).
                is_named |= read.take(&mailbox);
                mailbox.clear();
            }
            // What stands before it is a group's name.
            Token::Special(':') if !bracketed => {
                read.unreadable |= mailbox.iter().any(|token| matches!(token, Token::Special(_)));
                mailbox.clear();
            }
            token => {
                match token {
                    Token::Special('<') => bracketed = true,
                    Token::Special('>') => bracketed = false,
                    _ => {}
                }
                mailbox.push(token);
            }
        }
    }
    is_named |= read.take(&mailbox);
    read.unreadable |= !is_named || bracketed;
    read
}

impl Mailboxes {
    /// One of the list. False: it is empty.
    fn take(&mut self, mailbox: &[Token<'_>]) -> bool {
        let brackets = |token: &&Token<'_>| matches!(token, Token::Special('<' | '>'));
        let domain = match (mailbox.iter().filter(brackets).count(), mailbox) {
            (0, []) => return false,
            (0, _) if !mailbox.contains(&Token::Special('@')) => {
                self.unreadable = true;
                return true;
            }
            (0, address) => domain_of(address),
            // Only the name stands before it. It should be quoted where it is an address, but often is not.
            (2, [name @ .., Token::Special('>')]) => {
                let begin = name.iter().position(|token| *token == Token::Special('<'));
                let parts = begin.map(|begin| (&name[..begin], &name[begin + 1..]));
                let (name, address) = parts.unwrap_or_default();
                let domain = domain_of(without_route(address));
                let is_name = |of_name: &String| domain.as_ref().is_some_and(|it| it.eq_ignore_ascii_case(of_name));
                self.unreadable |=
                    name.contains(&Token::Special('@')) && !domain_of(name).as_ref().is_some_and(is_name);
                domain
            }
            _ => None,
        };
        self.unreadable |= domain.is_none();
        self.domains.push(domain);
        true
    }
}

/// `@relay,@relay:` before the address, which nobody writes any more (§4.4).
fn without_route<'a, 'b>(address: &'b [Token<'a>]) -> &'b [Token<'a>] {
    match (address, address.iter().position(|token| *token == Token::Special(':'))) {
        ([Token::Special('@'), ..], Some(colon)) => &address[colon + 1..],
        _ => address,
    }
}

/// Of an addr-spec (§3.4.1).
fn domain_of(address: &[Token<'_>]) -> Option<String> {
    let at = address.iter().position(|token| *token == Token::Special('@'))?;
    let (local, domain) = (&address[..at], &address[at + 1..]);
    if local.is_empty() || !are_joined(local) || !are_joined(domain) {
        return None;
    }
    let part = |token: &Token<'_>| match token {
        Token::Word(text) => Some((*text).to_owned()),
        _ => None,
    };
    match (local.iter().any(is_special), domain) {
        (true, _) | (_, []) => None,
        (_, [Token::Literal(literal)]) => Some((*literal).to_owned()),
        (_, words) => words.iter().map(part).collect(),
    }
}

fn is_special(token: &Token<'_>) -> bool {
    matches!(token, Token::Special(_) | Token::Literal(_))
}

/// Between two words of an address stands a dot; white space may, too (§4.4).
fn are_joined(words: &[Token<'_>]) -> bool {
    words.windows(2).all(|pair| match pair {
        [Token::Word(a), Token::Word(b)] => a.ends_with('.') || b.starts_with('.'),
        [Token::Word(dot), Token::Quoted] => dot.ends_with('.'),
        [Token::Quoted, Token::Word(dot)] => dot.starts_with('.'),
        _ => false,
    })
}

/// Without white space and comments. None: one of them, or a quoted string, has no end.
fn tokens(value: &str) -> Option<Vec<Token<'_>>> {
    let mut tokens = Vec::new();
    let mut rest = value;
    while let Some(c) = rest.chars().next() {
        let (token, length) = match c {
            ' ' | '\t' | '\r' | '\n' => (None, 1),
            '(' => (None, comment_length(rest)?),
            '"' => (Some(Token::Quoted), quoted_length(rest)?),
            '<' | '>' | '@' | ',' | ':' | ';' => (Some(Token::Special(c)), 1),
            _ => match (literal_length(rest), encoded_word_length(rest)) {
                (Some(length), _) => (Some(Token::Literal(&rest[..length])), length),
                (None, Some(length)) => (Some(Token::Word(&rest[..length])), length),
                (None, None) => {
                    let end = rest[c.len_utf8()..].find(|c: char| " \t\r\n()\"<>@,:;[".contains(c));
                    let length = end.map_or(rest.len(), |end| c.len_utf8() + end);
                    (Some(Token::Word(&rest[..length])), length)
                }
            },
        };
        tokens.extend(token);
        rest = &rest[length..];
    }
    Some(tokens)
}

/// §3.2.2; comments nest.
fn comment_length(text: &str) -> Option<usize> {
    let (mut depth, mut escaped) = (0, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'(' => depth += 1,
            b')' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(at + 1);
        }
    }
    None
}

/// §3.2.4.
fn quoted_length(text: &str) -> Option<usize> {
    let mut escaped = false;
    let end = text.bytes().skip(1).position(|byte| match byte {
        _ if escaped => {
            escaped = false;
            false
        }
        b'\\' => {
            escaped = true;
            false
        }
        byte => byte == b'"',
    });
    end.map(|end| end + 2)
}

/// §3.4.1, without white space. A `[` in a name begins none.
fn literal_length(text: &str) -> Option<usize> {
    let inner = text.strip_prefix('[')?;
    let end = inner.find(|c: char| c == ']' || !matches!(c, '!'..='~') || "[\\<>@\"".contains(c))?;
    inner[end..].starts_with(']').then_some(end + 2)
}

/// RFC 2047 §2. Some leave a comma or a colon in one as it is.
fn encoded_word_length(text: &str) -> Option<usize> {
    let inner = text.strip_prefix("=?")?;
    let end = inner.match_indices('?').nth(1).map(|(at, _)| at + 1)?;
    let end = end + inner[end..].find("?=")?;
    let is_plain = |c: char| matches!(c, '!'..='~') && !"<>@\"()".contains(c);
    inner[..end].chars().all(is_plain).then_some(end + 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domains(value: &str) -> (Vec<&'static str>, bool) {
        let read = read(value);
        let domains = read.domains.into_iter().map(|domain| &*domain.unwrap_or("?".to_owned()).leak()).collect();
        (domains, read.unreadable)
    }

    /// RFC 5322 §3.4, §4.4 and appendix A.
    #[test]
    fn what_is_well_formed_is_read() {
        for (value, expected) in [
            ("a@one.example", vec!["one.example"]),
            ("Joe Q. Public <john.q.public@example.com>", vec!["example.com"]),
            ("Mary Smith <mary@x.test>, jdoe@example.org, Who? <one@y.test>", vec!["x.test", "example.org", "y.test"]),
            ("<boss@nil.test>, \"Giant; \\\"Big\\\" Box\" <sysservices@example.net>", vec!["nil.test", "example.net"]),
            (
                "A Group:Ed Jones <c@a.test>,joe@where.test,John <jdoe@one.test>;",
                vec!["a.test", "where.test", "one.test"],
            ),
            ("Pete(A nice \\) chap) <pete(his account)@silly.test(his host)>", vec!["silly.test"]),
            ("(a (nested) comment) a@b.example (b@c.example)", vec!["b.example"]),
            (
                "Mary Smith <@node.test,@other.test:mary@example.net>, , jdoe@test . example",
                vec!["example.net", "test.example"],
            ),
            ("\"a b\"@b.example", vec!["b.example"]),
            ("\"a@evil.example\"@b.example", vec!["b.example"]),
            ("x <\"a b\"@b.example>", vec!["b.example"]),
            ("a\r\n @b.example", vec!["b.example"]),
            ("a(c)@b.example", vec!["b.example"]),
            ("a . b . \"c\"@b.example", vec!["b.example"]),
            ("a@[192.0.2.1]", vec!["[192.0.2.1]"]),
            ("\"<b@evil.example>\" <a@b.example>", vec!["b.example"]),
            ("=?utf-8?q?B=C3=BCcher?= <a@b.example>", vec!["b.example"]),
            ("j@b\u{fc}cher.example", vec!["b\u{fc}cher.example"]),
        ] {
            assert_eq!(domains(value), (expected, false), "{value:?}");
        }
    }

    /// Not well-formed, but it can be read in one way only, and is written so.
    #[test]
    fn what_is_only_sloppy_is_read() {
        for value in [
            "bob@b.example <bob@b.example>",
            "=?utf-8?q?Smith,_Bob:?= <a@b.example>",
            "[Sales] Bob [at work <a@b.example>",
            "Bob, <a@b.example>",
            "Re: Bob <a@b.example>",
        ] {
            let (domains, unreadable) = domains(value);
            let has_name_alone = value.starts_with("Bob,");
            assert_eq!((domains, unreadable), (vec!["b.example"], has_name_alone), "{value:?}");
        }
    }

    /// Some readers take the name for the address.
    #[test]
    fn an_address_as_a_name_has_to_be_of_the_same_domain() {
        for value in ["x@evil.example <a@b.example>", "x@evil.example y <a@b.example>,", "@evil.example <a@b.example>"]
        {
            assert_eq!(domains(value), (vec!["b.example"], true), "{value:?}");
        }
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_not() {
        for value in [
            "<b@evil.example> <a@b.example>",
            "\"x\" <b@evil.example> \"y\" <a@b.example>",
            "<b@evil.example><a@b.example>",
            "<a@b.example> b@evil.example",
            "<a@b.example> trailing",
            "<<b@evil.example> a@b.example>",
            "<b@evil.example> a@b.example>",
            "b@evil.example a@b.example",
            "b@evil.example@b.example",
            "<b@evil.example@b.example>",
            "a b@b.example",
            "a\"b\"@b.example",
            "a@b.example c.example",
            "<a@b.example",
            "a@b.example>",
            "<a@b.example; c@d.example>",
            "a@",
            "@b.example",
            "<@>",
            "<>",
            "a@\"b.example\"",
        ] {
            let (domains, unreadable) = domains(value);
            assert!(unreadable && domains.iter().all(|domain| *domain == "?"), "{value:?}: {domains:?}");
        }
        for value in ["", " \r\n", "just words", "nobody:;", "a@b.example (", "\"a@b.example", "\u{c0}\0,"] {
            assert_eq!(domains(value), (vec![], true), "{value:?}");
        }
    }
}
